"""Faces towards other libraries. Each module here knows one of them; nothing below imports these."""
