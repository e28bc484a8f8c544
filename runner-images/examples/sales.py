"""Totals per region of a CSV file in the workspace; leaves report.json there, which is collected as an artifact.

The event may name another file: {"file": "other.csv"}. A negative quantity is a return.
"""
import csv
import json
from collections import defaultdict
from decimal import Decimal
from pathlib import Path


def handler(event):
    regions = defaultdict(lambda: {"revenue": Decimal(0), "quantity": 0, "orders": 0})
    products = defaultdict(Decimal)
    with Path(event.get("file", "sales.csv")).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            quantity = int(row["quantity"])
            revenue = quantity * Decimal(row["unit_price"])
            region = regions[row["region"]]
            region["revenue"] += revenue
            region["quantity"] += quantity
            region["orders"] += 1
            products[row["product"]] += revenue
    if not regions:
        raise ValueError("the file holds no sales")

    ranking = sorted(regions, key=lambda name: regions[name]["revenue"], reverse=True)
    report = {
        "regions": [{"region": name, **regions[name], "revenue": str(regions[name]["revenue"])} for name in ranking],
        "products": {name: str(revenue) for name, revenue in sorted(products.items())},
    }
    Path("report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    for name in ranking:
        print("%-6s %10s" % (name, regions[name]["revenue"]))
    total = sum(region["revenue"] for region in regions.values())
    return {"total": str(total), "best_region": ranking[0], "orders": sum(r["orders"] for r in regions.values())}
