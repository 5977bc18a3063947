"""Errors of predicted times: error factors, their posterior, prediction intervals."""
