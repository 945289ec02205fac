"""The pages for browsers: runs, review of pairs, preference tests, samples and models (docs/decisions/024-pages.md).

A page has the address of the resource that it shows. A request that prefers HTML gets the page; all others get JSON.
"""
