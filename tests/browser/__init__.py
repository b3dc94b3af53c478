"""The notebook in a real browser: JupyterLab in headless Chromium, driven by Playwright."""
