"""The commands of `headwater`, one module per group. They import what they need when they run, not before."""
