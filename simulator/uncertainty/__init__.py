"""How far a predicted time may be off: error factors, their posterior, prediction intervals."""
