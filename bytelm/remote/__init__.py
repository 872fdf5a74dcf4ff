"""Run folders on object stores: copies to read, and the run that writes there."""
