"""Steps of a method that need all ranks: starts from W0 or its gradient, and AdaLoRA's budget.

The formulas are those of `dlora/lora/`; here is which rank computes what, and who receives it.
"""
