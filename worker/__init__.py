"""What prefill and decode workers share: options, the hosting of an engine, router sessions."""
