"""The engines: different places for actors to live, behind the one interface of rlx.actors.interface."""
