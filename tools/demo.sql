-- The comparison that tools/demo shows.  Needs the psql variable rows.

\set QUIET on
\pset pager off
\pset linestyle ascii
\pset footer off
SET client_min_messages = notice;

\echo
\echo The server of this demo:
SELECT name, current_setting(name) AS setting
FROM unnest(ARRAY['server_version', 'shared_buffers', 'max_wal_size',
				  'wal_level', 'fsync', 'autovacuum'])
	WITH ORDINALITY AS wanted (name, position)
ORDER BY position;

CREATE EXTENSION risky_migrations;

\echo The same change of a column from varchar to timestamp, on equal tables of :rows
\echo rows: first directly, by ALTER TABLE, then by rewriting it beside its users, then
\echo in three steps.  All the while one probe reads the table and one writes to it, and
\echo they note how long each took.
\echo
CALL rm_compare(:rows);

\echo
\echo What the three ways cost (times in milliseconds):
SELECT * FROM rm_comparison() \gx

\echo When it happened, and how long the probes had to wait:
\echo
\pset tuples_only on
\pset format unaligned
SELECT * FROM rm_timeline();
\pset format aligned
\pset tuples_only off

\echo Which locks were held, and for how long:
SELECT * FROM rm_lock_report();
