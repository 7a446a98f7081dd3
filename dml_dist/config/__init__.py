"""Configuration: frozen schema (`schema`), loading (`load`), documentation (`explain`)."""
