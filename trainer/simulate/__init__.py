"""Balancing rules on a routed model without experts: `python -m trainer.simulate`."""
