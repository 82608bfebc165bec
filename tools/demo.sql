-- The comparison that tools/demo shows.  Needs the psql variable rows.

\set QUIET on
\pset pager off
\pset linestyle ascii
SET client_min_messages = notice;

\echo
\echo The server of this demo:
SELECT name, current_setting(name) AS setting
FROM unnest(ARRAY['server_version', 'shared_buffers', 'max_wal_size',
				  'wal_level', 'fsync', 'autovacuum'])
	WITH ORDINALITY AS wanted (name, position)
ORDER BY position;

CREATE EXTENSION risky_migrations;

\echo One change of a column from integer to bigint, done twice on equal tables of
\echo :rows rows: once as plain ALTER TABLE, once as a risky migration.  Meanwhile
\echo probes read and write the table, and note how long each of them had to wait.
\echo
CALL rm_compare(:rows);

\echo
\echo What the two ways cost:
SELECT * FROM rm_comparison() \gx

\echo When it happened, and how long the probes waited:
SELECT * FROM rm_timeline();

\echo Which locks were held, and for how long:
SELECT * FROM rm_lock_report();
