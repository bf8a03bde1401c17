from .op import delta_gates, delta_rule, gated_norm, rms_norm, short_convolution, swiglu

__all__ = ["delta_gates", "delta_rule", "gated_norm", "rms_norm", "short_convolution", "swiglu"]
