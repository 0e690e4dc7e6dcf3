"""Engines that answer the probe in verify-adapter's worker; nothing here imports qpa.

Each file has `ENGINE`, an `EngineRecord`, and `open_engine(request)`, which returns an `Engine` of
`qpa.engines.engine`.
"""
