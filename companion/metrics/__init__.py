"""What a network costs."""

from companion.metrics.complexity import count_parameters, model_bytes

__all__ = ["count_parameters", "model_bytes"]
