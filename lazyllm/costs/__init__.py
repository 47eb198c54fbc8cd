"""What a prompt will cost on a device, from the shape of a model, a configuration and the device's numbers."""

from lazyllm.costs.calibrate import calibrate
from lazyllm.costs.device import Device, Rate
from lazyllm.costs.predict import Cost, Prediction, Seconds, entering_tokens, full_below_break_even, predict
from lazyllm.costs.shape import ModelShape

__all__ = [
    "Cost",
    "Device",
    "ModelShape",
    "Prediction",
    "Rate",
    "Seconds",
    "calibrate",
    "entering_tokens",
    "full_below_break_even",
    "predict",
]
