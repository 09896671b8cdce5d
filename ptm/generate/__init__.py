"""Text from models, whatever their family."""
