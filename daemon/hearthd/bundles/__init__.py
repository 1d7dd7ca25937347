"""Model directories: installed whole or not at all, and proven before anything is loaded."""
