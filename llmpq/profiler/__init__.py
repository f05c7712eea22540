"""Measures on this machine: layers' times (layers.py) and what each precision does to quality
(sensitivity.py). Writes profile.json and sensitivity.json; knows nothing of plans."""
