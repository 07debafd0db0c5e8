"""What is timed against what, in turn within one process. Results are committed as JSON under ``results/``.

``suite/`` states what is compared, one short file a benchmark; ``runner.py`` measures it; ``base.py`` compares with
another commit; ``page/`` writes docs/benchmarks.md from the results. It lives in the checkout, not in the installed
package.
"""
