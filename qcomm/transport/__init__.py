"""How ranks reach each other: one module per backend, all behind `qcomm.transport.base.Transport`."""
