"""Networks: encoders, action distributions, the policy that joins them, and how it acts."""
