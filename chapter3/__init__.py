"""Chapter 3: a router that knows what every engine has cached."""
