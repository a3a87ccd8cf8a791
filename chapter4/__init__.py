"""Chapter 4: a router that knows what every engine has cached."""
