"""Balancing rules on a routed model without experts: `triquetra simulate`."""
