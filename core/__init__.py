"""Errors, requests, sampling parameters, model geometry, events, configuration."""
