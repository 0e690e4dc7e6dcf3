"""Engines that answer the probe in verify-adapter's worker; nothing here imports qpa.

Each module has `open_engine(name, request)`, which returns an `Engine` of `qpa.engines.worker`.
"""
