"""The three designs for MMIO in a TD, side by side: one workload, counted under each.

`workload` is what the guest does and how its results are checked, `compare` runs and counts.
"""
