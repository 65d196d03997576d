"""One model on one device group: load, schedule, run, postprocess."""
