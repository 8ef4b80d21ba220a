"""The real scheduler driven by a clock instead of a model, and the baselines that the paper compares with."""
