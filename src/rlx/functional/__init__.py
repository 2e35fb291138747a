"""Pure tensor functions: no state, no I/O, no device moves. Each names its shapes and its source."""
