"""Gets the runs done: what is missing is trained here, on a cluster or on ImageNet, and the
notebooks are executed.
"""
