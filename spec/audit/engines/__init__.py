"""Engines as :class:`spec.audit.sample.EngineUnderAudit`. Each module imports what it drives only when used."""
