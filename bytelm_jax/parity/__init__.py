"""The two frameworks compared, tensor by tensor."""
