"""Images, features and the views made of them."""
