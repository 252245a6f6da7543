"""Alembic's folder for the catalogue of compiled grammars."""
