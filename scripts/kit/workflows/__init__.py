"""The templates and blueprints of the pack: what they are made of, and how the host's frontend makes them."""
