"""Width compression without fine-tuning and without labels: every method on the same networks and images.

`python -m benchmarks.cifar` makes the whole comparison; `__main__.py` says how, `methods.py` what is
compared.
"""
