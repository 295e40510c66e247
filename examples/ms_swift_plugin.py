"""swift rlhf --rlhf_type gkd --external_plugins examples/ms_swift_plugin.py ..."""

from drift_gate import DriftGate
from drift_gate.integrations.ms_swift import install

install(gate=DriftGate())
