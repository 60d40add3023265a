"""One module for each step: ``cases(settings)`` gives its cases, in order of worth."""
