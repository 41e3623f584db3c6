"""Gets the runs done: what is missing is trained here, on a cluster or on ImageNet, at a known
cost, and the notebooks are executed.
"""
