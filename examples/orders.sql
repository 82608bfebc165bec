-- A text column of dates becomes timestamptz on a table in use.
-- psql -f examples/orders.sql

CREATE EXTENSION IF NOT EXISTS risky_migrations;

CREATE TABLE orders (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	created_at text NOT NULL,
	amount numeric
);
INSERT INTO orders (created_at, amount)
SELECT to_char(timestamp '2024-01-01' + i * interval '1 minute', 'YYYY-MM-DD HH24:MI:SS'), i
FROM generate_series(1, 100000) i;

CALL rm_add_column('orders', 'created_at', 'timestamptz',
	$$created_at::timestamp AT TIME ZONE 'Europe/Berlin'$$);
CALL rm_backfill_batched(100000);
CALL rm_enforce_not_null();

SELECT step, lock_mode, wait_ms, hold_ms FROM rm_lock_report() WHERE relation = 'public.orders';
