"""The public functions, one file each with the op behind it: docstring, checks, forward, backward.

Calls `call`, `head`, `parallel` and `passes`; nothing but `drift_gate` itself and the integrations
calls these. The reference is called here, and only where a user asks for it.
"""
