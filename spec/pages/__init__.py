"""Reports as one self-contained HTML file: skeleton and style sheet, charts as inline SVG, figures for people."""
