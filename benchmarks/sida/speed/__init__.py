"""Speed and memory of Switch-base's encoder with few experts on the device, beside all of them there."""
