/* risky_migrations 1.0 */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION risky_migrations" to load this file. \quit

-- Sections: state, do, what hangs on a column, steer, know, watch, probes, lab; as
-- in doc/architecture.md.
-- What people call lives in the extension's schema and starts with rm_; what
-- the extension keeps lives in the schema risky_migrations.

-----------------------------------------------------------------------
-- State
-----------------------------------------------------------------------

CREATE SCHEMA risky_migrations;
GRANT USAGE ON SCHEMA risky_migrations TO PUBLIC;
COMMENT ON SCHEMA risky_migrations IS
	'state and step log of the extension risky_migrations; written by it alone';

CREATE TABLE risky_migrations.migration (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	method text NOT NULL CHECK (method IN ('direct', 'three_step', 'online_rewrite')),
	state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'done', 'rolled back')),
	steps_done integer NOT NULL DEFAULT 0,
	phase integer NOT NULL DEFAULT 0,
	owner oid NOT NULL,
	relid oid NOT NULL,
	relation text NOT NULL,
	attnum smallint NOT NULL,
	column_name text NOT NULL,
	old_type text NOT NULL,
	old_type_id oid NOT NULL,
	old_collation text,
	old_storage text,
	old_compression text,
	new_type text NOT NULL,
	new_type_id oid NOT NULL,
	new_typmod integer NOT NULL,
	new_attnum smallint NOT NULL DEFAULT 0,
	new_column text,
	using_expr text NOT NULL,
	reverse_expr text,
	exact_check text,
	reverse_check text,
	settings text[] NOT NULL,
	conversion_tree text NOT NULL,
	server_version integer NOT NULL,
	enforced boolean NOT NULL DEFAULT false,
	trigger_xmin bigint NOT NULL DEFAULT 0,
	by_leaf boolean NOT NULL DEFAULT false,
	leaf oid NOT NULL DEFAULT 0,
	relfilenode oid NOT NULL DEFAULT 0,
	next_block bigint NOT NULL DEFAULT 0,
	end_block bigint NOT NULL DEFAULT 0,
	rows_done bigint NOT NULL DEFAULT 0,
	rows_estimated bigint NOT NULL DEFAULT 0,
	inexact_rows bigint NOT NULL DEFAULT 0,
	old_column text,
	swapped boolean NOT NULL DEFAULT false,
	reverse_tree text,
	fingerprint text,
	null_on_error boolean NOT NULL DEFAULT false,
	ranges integer NOT NULL DEFAULT 0,
	method_reason text,
	-- what online_rewrite has to prove after the cut-over
	to_prove text[] NOT NULL DEFAULT '{}',
	created_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 10);
COMMENT ON TABLE risky_migrations.migration IS 'one requested change of a column''s type, or of several; one row of state; attnum 0: of none, the table is written anew';

CREATE TABLE risky_migrations.further_column (
	migration_id bigint NOT NULL REFERENCES risky_migrations.migration ON DELETE CASCADE,
	number integer NOT NULL,
	attnum smallint NOT NULL,
	column_name text NOT NULL,
	old_type text NOT NULL,
	old_type_id oid NOT NULL,
	new_type text NOT NULL,
	new_type_id oid NOT NULL,
	new_typmod integer NOT NULL,
	using_expr text NOT NULL,
	conversion_tree text NOT NULL,
	PRIMARY KEY (migration_id, number)
);
COMMENT ON TABLE risky_migrations.further_column IS 'columns that a migration changes besides the one in its own row, from number 2 on';

-- not part of the migration's row, which its runner keeps locked: whoever wants
-- something of the runner must not wait for it
CREATE TABLE risky_migrations.steering (
	migration_id bigint PRIMARY KEY REFERENCES risky_migrations.migration ON DELETE CASCADE,
	wanted text NOT NULL DEFAULT 'run' CHECK (wanted IN ('run', 'paused', 'cancelled')),
	wanted_by oid,
	wanted_at timestamptz,
	all_steps boolean NOT NULL DEFAULT false,
	cut_over text NOT NULL DEFAULT 'auto' CHECK (cut_over IN ('auto', 'manual')),
	batch integer NOT NULL DEFAULT 100000,
	background boolean NOT NULL DEFAULT false,
	session_role oid,
	role oid,
	settings text[],
	launches integer NOT NULL DEFAULT 0,
	launch_mark text
);
COMMENT ON TABLE risky_migrations.steering IS 'how a migration is to be run, and what is wanted of its runner; no row for one that is run step by step and left alone';

CREATE TABLE risky_migrations.leaf (
	migration_id bigint NOT NULL REFERENCES risky_migrations.migration ON DELETE CASCADE,
	relid oid NOT NULL,
	relfilenode oid NOT NULL DEFAULT 0,
	end_block bigint NOT NULL DEFAULT 0,
	trigger_xmin bigint NOT NULL DEFAULT 0,
	done boolean NOT NULL DEFAULT false,
	PRIMARY KEY (migration_id, relid)
);
COMMENT ON TABLE risky_migrations.leaf IS 'partitions of a partitioned table, or a table and its children, that are filled or verified, one row each; the one under way is in the migration''s row';

-- locked by whoever works on it, for one transaction at a time
CREATE TABLE risky_migrations.range (
	migration_id bigint NOT NULL REFERENCES risky_migrations.migration ON DELETE CASCADE,
	number integer NOT NULL,
	relid oid NOT NULL,
	relfilenode oid NOT NULL,
	-- who works on it: the runner's row of step_log, and there its helper of
	-- that number or (0) itself
	run bigint NOT NULL DEFAULT 0,
	worker integer,
	first_block bigint NOT NULL,
	next_block bigint NOT NULL,
	end_block bigint NOT NULL,
	rows_checked bigint NOT NULL DEFAULT 0,
	rows_changed bigint NOT NULL DEFAULT 0,
	rows_failed bigint NOT NULL DEFAULT 0,
	rows_nulled bigint NOT NULL DEFAULT 0,
	PRIMARY KEY (migration_id, number)
) WITH (fillfactor = 10);
COMMENT ON TABLE risky_migrations.range IS 'ranges of pages on which several workers are at work: below next_block everything is done';

CREATE TABLE risky_migrations.rewrite (
	migration_id bigint NOT NULL REFERENCES risky_migrations.migration ON DELETE CASCADE,
	-- the table that the shadow is of: the migration's, or a partition
	relid oid NOT NULL,
	-- steps of the method that are done for it
	steps_done integer NOT NULL DEFAULT 0,
	relfilenode oid NOT NULL DEFAULT 0,
	end_block bigint NOT NULL DEFAULT 0,
	shadow oid NOT NULL,
	log oid NOT NULL,
	key_index oid NOT NULL,
	trigger_mark bigint NOT NULL DEFAULT 0,
	ground text NOT NULL,
	-- the transactions that were in progress when the change log began
	s0_next bigint NOT NULL DEFAULT 0,
	s0_xmin bigint NOT NULL DEFAULT 0,
	s0_running bigint[] NOT NULL DEFAULT '{}',
	s0_overflowed boolean NOT NULL DEFAULT false,
	shadow_storage oid NOT NULL,
	rows_failed bigint NOT NULL DEFAULT 0,
	fingerprint text,
	-- when there were statistics for the shadow
	analyzed timestamptz,
	PRIMARY KEY (migration_id, relid)
);
COMMENT ON TABLE risky_migrations.rewrite IS 'what online_rewrite keeps of a migration besides its row, for each table that holds rows: shadow table, change log, and how far they are';

-- a row is a place in the table: number of its page * 65536 + number on the page
CREATE TABLE risky_migrations.rewrite_chunk (
	shadow oid NOT NULL,
	first_block bigint NOT NULL,
	end_block bigint NOT NULL,
	first_row bigint NOT NULL,
	end_row bigint NOT NULL,
	copied boolean NOT NULL DEFAULT true,
	rows_verified bigint,
	PRIMARY KEY (shadow, first_block)
);
COMMENT ON TABLE risky_migrations.rewrite_chunk IS 'pages of a shadow table, and the rows of the table that they were copied from; pages that are in none are no good';
COMMENT ON COLUMN risky_migrations.rewrite_chunk.rows_verified IS 'how many rows were compared while the indexes were built, and none has changed since; NULL: not verified yet';

CREATE TABLE risky_migrations.skipped_row (
	migration_id bigint NOT NULL,
	relfilenode oid NOT NULL,
	row_tid tid NOT NULL
);
CREATE INDEX ON risky_migrations.skipped_row (migration_id);
COMMENT ON TABLE risky_migrations.skipped_row IS 'rows that were locked when the backfill came by, to be visited one by one';

-- no foreign key: it would make a writer wait for whoever runs the migration,
-- or fail when its snapshot is older than the migration's row
CREATE TABLE risky_migrations.conversion_error (
	migration_id bigint NOT NULL,
	at timestamptz NOT NULL DEFAULT clock_timestamp(),
	row_key text,
	row_tid tid,
	value text,
	sqlstate text NOT NULL,
	message text NOT NULL,
	way_back boolean NOT NULL DEFAULT false
);
CREATE INDEX ON risky_migrations.conversion_error (migration_id);
COMMENT ON TABLE risky_migrations.conversion_error IS 'values that did not convert; hints, the rows themselves are looked at again';

CREATE TABLE risky_migrations.step_log (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	migration_id bigint REFERENCES risky_migrations.migration ON DELETE CASCADE,
	approach text NOT NULL,
	step text NOT NULL,
	direction text NOT NULL CHECK (direction IN ('apply', 'rollback')),
	state text NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted')),
	owner oid NOT NULL,
	relid oid NOT NULL,
	relation text NOT NULL,
	pid integer NOT NULL DEFAULT pg_backend_pid(),
	started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	finished_at timestamptz,
	duration_ms double precision,
	transactions bigint NOT NULL DEFAULT 0,
	batches bigint NOT NULL DEFAULT 0,
	rows_changed bigint NOT NULL DEFAULT 0,
	rows_hot bigint NOT NULL DEFAULT 0,
	lock_retries bigint NOT NULL DEFAULT 0,
	wal_bytes bigint NOT NULL DEFAULT 0,
	-- blocks and rows: where this run began, done, total (0: not known); workers
	progress bigint[] NOT NULL DEFAULT '{0,0,0,0,0,0,1}',
	-- why it does not go on right now
	wait_kind text,
	wait_reason text,
	wait_since timestamptz,
	sqlstate text,
	message text,
	detail text,
	hint text
) WITH (fillfactor = 50);
CREATE INDEX ON risky_migrations.step_log (relid);
COMMENT ON TABLE risky_migrations.step_log IS 'every step that was begun: what all reports read';

CREATE TABLE risky_migrations.step_lock (
	step_id bigint NOT NULL REFERENCES risky_migrations.step_log ON DELETE CASCADE,
	relid oid NOT NULL,
	relation text NOT NULL,
	role text NOT NULL,
	lock_mode text NOT NULL,
	blocks_reads boolean NOT NULL,
	blocks_writes boolean NOT NULL,
	wait_ms double precision,
	hold_ms double precision,
	hold_is_exact boolean NOT NULL,
	times bigint NOT NULL,
	rewritten boolean NOT NULL,
	PRIMARY KEY (step_id, relid, lock_mode)
);
COMMENT ON TABLE risky_migrations.step_lock IS 'the locks of each step on user relations, read from the lock table before each commit';

CREATE TABLE risky_migrations.dependent (
	migration_id bigint NOT NULL REFERENCES risky_migrations.migration ON DELETE CASCADE,
	side text NOT NULL CHECK (side IN ('new', 'old')),
	ord integer NOT NULL,
	kind text NOT NULL,
	name text NOT NULL,
	relid oid NOT NULL,
	peer oid,
	build_name text,
	build_sql text,
	by_worker boolean NOT NULL DEFAULT false,
	validate_sql text,
	make_sql text,
	take_sql text[] NOT NULL DEFAULT '{}',
	drop_sql text,
	PRIMARY KEY (migration_id, side, ord)
);
COMMENT ON TABLE risky_migrations.dependent IS
	'what hangs on a migration''s column, and the commands that make it on the other column';

CREATE TABLE risky_migrations.lab (
	nspid oid PRIMARY KEY,
	small_relid oid NOT NULL,
	large_relid oid NOT NULL,
	owner oid NOT NULL,
	created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE risky_migrations.lab IS 'the tables that migration 0001 of the lab made, by schema';

CREATE TABLE risky_migrations.probe (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	owner oid NOT NULL,
	session_role oid NOT NULL,
	query text NOT NULL,
	every interval NOT NULL,
	timeout interval NOT NULL,
	time_limit interval NOT NULL,
	settings text[] NOT NULL DEFAULT '{}',
	started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	ended_at timestamptz,
	end_reason text
);
COMMENT ON TABLE risky_migrations.probe IS 'background workers that run one query again and again and record each latency';

CREATE TABLE risky_migrations.probe_sample (
	probe_id bigint NOT NULL REFERENCES risky_migrations.probe ON DELETE CASCADE,
	at timestamptz NOT NULL,
	latency_ms double precision NOT NULL,
	outcome text NOT NULL CHECK (outcome IN ('ok', 'timeout', 'error')),
	sqlstate text,
	message text
);
CREATE INDEX ON risky_migrations.probe_sample (probe_id, at);
COMMENT ON TABLE risky_migrations.probe_sample IS 'what the probes measured';

CREATE TABLE risky_migrations.comparison (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	run_id bigint NOT NULL,
	approach text NOT NULL,
	owner oid NOT NULL,
	rows bigint NOT NULL,
	started_at timestamptz NOT NULL,
	finished_at timestamptz NOT NULL,
	first_step bigint NOT NULL,
	last_step bigint NOT NULL,
	read_probe bigint NOT NULL,
	write_probe bigint NOT NULL,
	heap_bytes_before bigint NOT NULL,
	heap_bytes_after bigint NOT NULL,
	index_bytes_before bigint NOT NULL,
	index_bytes_after bigint NOT NULL,
	rows_checked bigint NOT NULL,
	rows_wrong bigint NOT NULL
);
COMMENT ON TABLE risky_migrations.comparison IS 'the runs of rm_compare, one row for each approach';

-- State is nobody else's.  A publication FOR ALL TABLES has these tables too: logical
-- decoding passes over them, as over shadow and log (rewrite_log.c), or subscribers would
-- stop at a table that they do not have.  And it refuses UPDATE and DELETE of rows that
-- it could not tell apart.
ALTER TABLE risky_migrations.skipped_row REPLICA IDENTITY FULL;
ALTER TABLE risky_migrations.conversion_error REPLICA IDENTITY FULL;
ALTER TABLE risky_migrations.probe_sample REPLICA IDENTITY FULL;
UPDATE pg_catalog.pg_class c SET relrewrite = c.oid
WHERE c.relnamespace = 'risky_migrations'::regnamespace AND c.relkind = 'r'
	OR c.oid IN (SELECT t.reltoastrelid FROM pg_catalog.pg_class t WHERE t.relnamespace = 'risky_migrations'::regnamespace);

-- who may see what belongs to a table: who may act as its owner, or, when the
-- table is gone, as the role that did it
CREATE FUNCTION risky_migrations.may_see(relid oid, owner oid) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT coalesce(
		(SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_catalog.pg_class c WHERE c.oid = relid),
		-- a role that was dropped has no members: only superusers see its rows
		(SELECT pg_has_role(r.oid, 'USAGE') FROM pg_catalog.pg_roles r WHERE r.oid = owner),
		(SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user));
END;
COMMENT ON FUNCTION risky_migrations.may_see(oid, oid) IS
	'may the current role see the state that belongs to this table?';

-----------------------------------------------------------------------
-- Do
-----------------------------------------------------------------------

CREATE FUNCTION risky_migrations.sync() RETURNS trigger
AS 'MODULE_PATHNAME', 'rm_sync' LANGUAGE C;
COMMENT ON FUNCTION risky_migrations.sync() IS
	'the sync trigger; made by rm_add_column() with the migration''s id as its argument';

CREATE FUNCTION risky_migrations.log_change() RETURNS trigger
AS 'MODULE_PATHNAME', 'rm_log_change' LANGUAGE C;
COMMENT ON FUNCTION risky_migrations.log_change() IS
	'the trigger that writes the change log of online_rewrite, with the migration''s id as its argument';

CREATE FUNCTION risky_migrations.rewrite_ground(relid oid) RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT md5(coalesce(string_agg(f.line, ',' ORDER BY f.line), '')) FROM (
		SELECT format('a%s/%s %s %s %s %s %s', a.attnum, a.atttypid, a.atttypmod, a.attnotnull, a.attisdropped,
			a.attgenerated, a.attcollation) AS line
		FROM pg_attribute a WHERE a.attrelid = rewrite_ground.relid AND a.attnum > 0
		UNION ALL SELECT format('k%s/%s', k.oid, k.xmin) FROM pg_constraint k
		WHERE k.conrelid = rewrite_ground.relid AND k.contype = 'c'
		UNION ALL SELECT format('c%s %s %s %s', c.relkind, c.relpersistence, c.relam, c.relowner)
		FROM pg_class c WHERE c.oid = rewrite_ground.relid) f (line);
END;
COMMENT ON FUNCTION risky_migrations.rewrite_ground(oid) IS
	'changes with everything that a table''s shadow was made for: columns, CHECK constraints, owner, persistence';

CREATE FUNCTION risky_migrations.steady_text(value text) RETURNS text
AS 'MODULE_PATHNAME', 'rm_steady_text' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.steady_text(text) IS
	'the value itself; an error (22007) if it names a moment by the clock, such as today';

CREATE FUNCTION risky_migrations.step_name(method text, steps_done integer) RETURNS text
AS 'MODULE_PATHNAME', 'rm_step_name' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.step_name(text, integer) IS
	'the method''s next step when so many are done; NULL if there is none';

CREATE PROCEDURE rm_alter_type(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL, method text DEFAULT 'three_step',
	reverse_expr text DEFAULT NULL, cut_over text DEFAULT 'auto',
	on_error text DEFAULT 'stop', batch bigint DEFAULT 100000)
AS 'MODULE_PATHNAME', 'rm_alter_type' LANGUAGE C;
COMMENT ON PROCEDURE rm_alter_type(text, text, text, text, text, text, text, text, bigint) IS
	'changes a column''s type: all steps of the method (three_step, online_rewrite, direct, or auto: which of them is told), in this session; cut_over manual stops before the swap, on_error null makes NULL what does not convert';

CREATE FUNCTION rm_start(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL, method text DEFAULT 'three_step',
	reverse_expr text DEFAULT NULL, cut_over text DEFAULT 'auto',
	on_error text DEFAULT 'stop', batch bigint DEFAULT 100000) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_start' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_start(text, text, text, text, text, text, text, text, bigint) IS
	'the same in a background worker, which begins when the transaction commits and needs no client; returns the migration''s id';

CREATE PROCEDURE rm_alter_types(relation text, changes jsonb, method text DEFAULT 'auto',
	cut_over text DEFAULT 'auto', batch bigint DEFAULT 100000)
AS 'MODULE_PATHNAME', 'rm_alter_types' LANGUAGE C;
COMMENT ON PROCEDURE rm_alter_types(text, jsonb, text, text, bigint) IS
	'changes the types of several columns in one pass: changes is an object of their names, each with a type or with {"type": ..., "using": ...}; {} writes the table anew (online_rewrite, direct, or auto)';

CREATE FUNCTION rm_start(relation text, changes jsonb, method text DEFAULT 'auto',
	cut_over text DEFAULT 'auto', batch bigint DEFAULT 100000) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_start_types' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_start(text, jsonb, text, text, bigint) IS
	'what rm_alter_types() does, in a background worker; returns the migration''s id';

CREATE PROCEDURE risky_migrations.run(migration bigint)
AS 'MODULE_PATHNAME', 'rm_run' LANGUAGE C;
COMMENT ON PROCEDURE risky_migrations.run(bigint) IS
	'goes on with all steps of a migration, in this session; what a background worker calls';

CREATE PROCEDURE risky_migrations.help()
AS 'MODULE_PATHNAME', 'rm_help' LANGUAGE C;
COMMENT ON PROCEDURE risky_migrations.help() IS
	'works on ranges of pages beside the runner of a migration; what its background workers call';

CREATE PROCEDURE rm_cut_over(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_cut_over' LANGUAGE C;
COMMENT ON PROCEDURE rm_cut_over(bigint) IS
	'goes on with a migration that was started with cut_over manual and stands before its swap';

CREATE PROCEDURE rm_add_column(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL, reverse_expr text DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_add_column' LANGUAGE C;
COMMENT ON PROCEDURE rm_add_column(text, text, text, text, text) IS
	'step 1 of three_step: adds the shadow column <column>_new and the trigger that keeps it in step; ACCESS EXCLUSIVE for milliseconds';

CREATE PROCEDURE rm_backfill_batched(batch bigint DEFAULT 100000, migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_backfill_batched' LANGUAGE C;
COMMENT ON PROCEDURE rm_backfill_batched(bigint, bigint) IS
	'step 2 of three_step: fills the shadow column, at most batch rows to a transaction; resumable; without a migration''s id the only open one is meant';

CREATE PROCEDURE rm_enforce_not_null(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_enforce_not_null' LANGUAGE C;
COMMENT ON PROCEDURE rm_enforce_not_null(bigint) IS
	'step 3 of three_step: verifies every row and makes the shadow column NOT NULL without a scan under the lock';

CREATE PROCEDURE rm_swap(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_swap' LANGUAGE C;
COMMENT ON PROCEDURE rm_swap(bigint) IS
	'step 4 of three_step: builds what hangs on the column on the new one, waits for older snapshots, and exchanges the columns in one short transaction';

CREATE PROCEDURE rm_cleanup(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_cleanup' LANGUAGE C;
COMMENT ON PROCEDURE rm_cleanup(bigint) IS
	'step 5 of three_step: drops the old column, after which there is no way back';

CREATE PROCEDURE rm_rollback(migration bigint DEFAULT NULL)
AS 'MODULE_PATHNAME', 'rm_rollback' LANGUAGE C;
COMMENT ON PROCEDURE rm_rollback(bigint) IS
	'takes a migration back from wherever it stands, with nothing left lying about';

-----------------------------------------------------------------------
-- What hangs on a column
-----------------------------------------------------------------------

-- Views, rules, triggers and policies know a column by its number, and would
-- stay with the old one when the new one takes its name.  So the swap reads
-- their definitions, drops them, renames the columns and makes them again: the
-- definitions are text in which the column is known by its name.
--
-- Easy to get wrong:
-- * DROP VIEW wants everything on the view to be gone, also what does not use
--   the column: all functions below start from column_dependents(), which
--   follows views, and the row types of views.
-- * A whole-row reference (SELECT t FROM t) leaves no dependency on the
--   column; it is found in the stored tree.
-- * A definition may name columns by position: FROM t x(a, b), also where
--   nobody wrote it like that; FROM f() where f returns rows of the table.  Made
--   again, it would silently read the old column.  column_obstacles() tells
--   those that can be told from text; whoever has made the objects again looks
--   at column_left_behind().
-- * Definitions are read with settings of their own (names in full, moments in
--   ISO form), so that they mean the same whatever the session has set.  How
--   backslashes are quoted goes by the session: it has to make them itself.
-- * They are read by names.  Between reading them and dropping the objects
--   nobody may change these: lock column_relations() first.
-- * What a new type does to a definition (an operator that does not exist, a
--   default that does not fit) shows only when it is made.
-- * All that inherit the column are meant, partitions or children, each with its own
--   number for it: see member_columns().  What a partitioned table has passed on
--   to its partitions (clones of its triggers) goes and comes with the parent's.

CREATE FUNCTION risky_migrations.members(root oid) RETURNS SETOF oid
-- few, so that catalogs are searched by index for each
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE member (oid) AS (
		SELECT members.root
		UNION
		SELECT h.inhrelid FROM member m
		JOIN pg_catalog.pg_inherits h ON h.inhparent = m.oid AND NOT h.inhdetachpending
	)
	SELECT m.oid FROM member m;
END;
COMMENT ON FUNCTION risky_migrations.members(oid) IS
	'the table and all that is below it, partitions or children';

CREATE FUNCTION risky_migrations.ancestors(relid oid) RETURNS SETOF oid
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE ancestor (oid) AS (
		SELECT ancestors.relid
		UNION
		SELECT h.inhparent FROM ancestor a JOIN pg_catalog.pg_inherits h ON h.inhrelid = a.oid
	)
	SELECT a.oid FROM ancestor a;
END;
COMMENT ON FUNCTION risky_migrations.ancestors(oid) IS
	'the table and all that it inherits from, or is a partition of';

CREATE FUNCTION risky_migrations.column_origin(relid oid, column_name text) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT a.attrelid
	FROM risky_migrations.ancestors(column_origin.relid) p (oid)
	JOIN pg_catalog.pg_attribute a ON a.attrelid = p.oid AND a.attname = column_origin.column_name::name
	WHERE a.attinhcount = 0
	ORDER BY a.attrelid LIMIT 1;
END;
COMMENT ON FUNCTION risky_migrations.column_origin(oid, text) IS
	'the table from which a column is inherited, at the top; one of them, if there are several';

CREATE FUNCTION risky_migrations.member_columns(relid oid, attnums smallint[])
RETURNS TABLE (member oid, number smallint)
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT m.oid, b.attnum
	FROM risky_migrations.members(member_columns.relid) m (oid)
	JOIN pg_catalog.pg_attribute a ON a.attrelid = member_columns.relid AND a.attnum = ANY (member_columns.attnums)
	JOIN pg_catalog.pg_attribute b ON b.attrelid = m.oid AND b.attname = a.attname;
END;
COMMENT ON FUNCTION risky_migrations.member_columns(oid, smallint[]) IS
	'the columns in each of the table''s members, which may have other numbers there';

-- Counted in the lock table at the end of cut-overs and swaps, rounded up.  PostgreSQL locks
-- what it drops as well: types, constraints, triggers, the heap that ALTER TABLE makes.
CREATE FUNCTION risky_migrations.locks_needed(method text, relid oid, attnums smallint[], toast boolean)
RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH how AS (
		SELECT locks_needed.method = 'online_rewrite' AS rewrite, locks_needed.attnums <> '{}' AS alters
	), t AS MATERIALIZED (
		SELECT c.oid, c.relkind = 'r' AS holds_rows, c.reltoastrelid <> 0 OR locks_needed.toast AS toast,
			ARRAY(SELECT b.attnum FROM pg_attribute a JOIN pg_attribute b ON b.attrelid = c.oid AND b.attname = a.attname
				WHERE a.attrelid = locks_needed.relid AND a.attnum = ANY (locks_needed.attnums)) AS numbers
		FROM risky_migrations.members(locks_needed.relid) m (oid) JOIN pg_class c ON c.oid = m.oid
	), n (locks) AS (
		-- the table, shadow and log, and what goes with these two and the heap that ALTER TABLE makes
		SELECT CASE WHEN NOT how.rewrite OR NOT t.holds_rows THEN 1
			ELSE 8 + CASE WHEN how.alters THEN 5 ELSE 0 END
				+ CASE WHEN NOT t.toast THEN 0 WHEN how.alters THEN 6 ELSE 4 END
				+ CASE WHEN EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = ANY (i.indkey)
					WHERE i.indrelid = t.oid AND i.indisunique AND a.attstorage <> 'p') THEN 2 ELSE 0 END END
		FROM t, how
		-- the shadow has one too, and those on the column are made anew
		UNION ALL SELECT CASE WHEN how.rewrite AND t.holds_rows THEN 2 ELSE 1 END
			+ CASE WHEN t.numbers && i.indkey::smallint[] OR i.indexprs IS NOT NULL OR i.indpred IS NOT NULL THEN 1 ELSE 0 END
		FROM how, t JOIN pg_index i ON i.indrelid = t.oid
		UNION ALL SELECT CASE k.contype WHEN 'f' THEN 4 ELSE 2 END
		FROM t JOIN pg_constraint k ON k.conrelid = t.oid AND k.conkey && t.numbers
		UNION ALL SELECT 4
		FROM t JOIN pg_constraint k ON k.confrelid = t.oid AND k.confkey && t.numbers
		UNION ALL SELECT 1
		FROM t JOIN pg_attrdef d ON d.adrelid = t.oid AND d.adnum = ANY (t.numbers)
		UNION ALL SELECT 1
		FROM t JOIN pg_trigger g ON g.tgrelid = t.oid AND NOT g.tgisinternal AND NOT starts_with(g.tgname, '~rm_')
	)
	-- catalogs, state tables, views and the like
	SELECT 100 + sum(n.locks) FROM n;
END;
COMMENT ON FUNCTION risky_migrations.locks_needed(text, oid, smallint[], boolean) IS
	'how many locks the method holds at once, about; toast: whether a new type may be stored out of line';

CREATE FUNCTION risky_migrations.column_foreign_keys(relid oid, attnums smallint[])
RETURNS TABLE (relid oid, peer oid, drop_sql text, add_sql text, comment_sql text, validate_sql text)
LANGUAGE sql VOLATILE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT k.conrelid, k.confrelid,
		format('ALTER TABLE ONLY %s DROP CONSTRAINT %I', r.name, k.conname),
		format('ALTER TABLE ONLY %s ADD CONSTRAINT %I %s%s', r.name, k.conname, pg_get_constraintdef(k.oid),
			CASE WHEN k.convalidated THEN ' NOT VALID' ELSE '' END),
		CASE WHEN obj_description(k.oid, 'pg_constraint') IS NOT NULL
			THEN format('COMMENT ON CONSTRAINT %I ON %s IS %L', k.conname, r.name, obj_description(k.oid, 'pg_constraint')) END,
		CASE WHEN k.convalidated THEN format('ALTER TABLE ONLY %s VALIDATE CONSTRAINT %I', r.name, k.conname) END
	FROM pg_constraint k
	CROSS JOIN LATERAL (SELECT format('%I.%I', n.nspname, c.relname) AS name
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = k.conrelid) r
	WHERE k.contype = 'f' AND k.conparentid = 0
		AND EXISTS (SELECT FROM risky_migrations.member_columns(column_foreign_keys.relid, column_foreign_keys.attnums) m
			WHERE k.conrelid = m.member AND m.number = ANY (k.conkey)
				OR k.confrelid = m.member AND m.number = ANY (k.confkey))
	ORDER BY k.oid;
END;
COMMENT ON FUNCTION risky_migrations.column_foreign_keys(oid, smallint[]) IS
	'foreign keys on a column, at either end, with the statements that drop them, add them NOT VALID, and prove them';

CREATE FUNCTION risky_migrations.column_dependents(relid oid, attnums smallint[])
RETURNS TABLE (classid oid, objid oid, relation oid, depth integer)
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE target AS (
		SELECT c.oid, m.number AS attnum,
			-- a whole row of it, or of a join
			pg_catalog.format(':varattno 0 :vartype (%s|2249) ', c.reltype) AS whole_row
		FROM risky_migrations.member_columns(column_dependents.relid, column_dependents.attnums) m
		JOIN pg_catalog.pg_class c ON c.oid = m.member
	), direct AS (
		SELECT d.classid, d.objid
		FROM target t JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_class'::regclass
			AND d.refobjid = t.oid AND d.refobjsubid = t.attnum
		UNION
		-- ON CONFLICT ON CONSTRAINT, GROUP BY the primary key
		SELECT d.classid, d.objid
		FROM target t
		JOIN pg_catalog.pg_constraint k ON k.conrelid = t.oid AND t.attnum = ANY (k.conkey)
		JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_constraint'::regclass AND d.refobjid = k.oid
		WHERE d.classid IN ('pg_catalog.pg_rewrite'::regclass, 'pg_catalog.pg_proc'::regclass, 'pg_catalog.pg_policy'::regclass)
		UNION
		SELECT d.classid, d.objid
		FROM target t JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_class'::regclass
			AND d.refobjid = t.oid
		LEFT JOIN pg_catalog.pg_rewrite r ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.oid = d.objid
		LEFT JOIN pg_catalog.pg_proc p ON d.classid = 'pg_catalog.pg_proc'::regclass AND p.oid = d.objid
		WHERE r.ev_action::text ~ t.whole_row OR r.ev_qual::text ~ t.whole_row OR p.prosqlbody::text ~ t.whole_row
	), view (oid) AS (
		SELECT r.ev_class FROM direct d
		JOIN pg_catalog.pg_rewrite r ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.oid = d.objid AND r.ev_type = '1'
		JOIN pg_catalog.pg_class c ON c.oid = r.ev_class
		-- a copy that waits, of a whole row of the table: see column_copies()
		WHERE c.relname !~ '^rm_[no]_[0-9]+_[0-9]+$'
		UNION
		SELECT r.ev_class FROM view v
		JOIN pg_catalog.pg_class c ON c.oid = v.oid
		JOIN pg_catalog.pg_type y ON y.oid = c.reltype
		CROSS JOIN LATERAL (VALUES ('pg_catalog.pg_class'::regclass, c.oid),
			('pg_catalog.pg_type'::regclass, y.oid), ('pg_catalog.pg_type'::regclass, y.typarray)) x (classid, objid)
		JOIN pg_catalog.pg_depend d ON d.refclassid = x.classid AND d.refobjid = x.objid
			AND d.classid = 'pg_catalog.pg_rewrite'::regclass
		JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid AND r.ev_type = '1'
	), on_view AS (
		SELECT v.oid AS view, d.classid, d.objid, r.ev_class, r.ev_type
		FROM view v
		JOIN pg_catalog.pg_class c ON c.oid = v.oid
		JOIN pg_catalog.pg_type y ON y.oid = c.reltype
		CROSS JOIN LATERAL (VALUES ('pg_catalog.pg_class'::regclass, c.oid),
			('pg_catalog.pg_type'::regclass, y.oid), ('pg_catalog.pg_type'::regclass, y.typarray)) x (classid, objid)
		JOIN pg_catalog.pg_depend d ON d.refclassid = x.classid AND d.refobjid = x.objid
		LEFT JOIN pg_catalog.pg_rewrite r ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.oid = d.objid
	), level (oid, depth) AS (
		SELECT v.oid, 1 FROM view v
		UNION
		-- views may stand on each other in a circle: then there is no deepest
		SELECT o.ev_class, l.depth + 1 FROM level l
		JOIN on_view o ON o.view = l.oid AND o.ev_type = '1' AND o.ev_class <> o.view
		WHERE l.depth <= (SELECT pg_catalog.count(*) FROM view)
	), found AS (
		SELECT d.classid, d.objid FROM direct d
		UNION
		SELECT o.classid, o.objid FROM on_view o
	)
	SELECT 'pg_catalog.pg_class'::regclass, l.oid, l.oid, pg_catalog.max(l.depth) FROM level l GROUP BY l.oid
	UNION ALL
	SELECT f.classid, f.objid, coalesce(r.ev_class, g.tgrelid, p.polrelid), 0
	FROM found f
	LEFT JOIN pg_catalog.pg_rewrite r ON f.classid = 'pg_catalog.pg_rewrite'::regclass AND r.oid = f.objid
	LEFT JOIN pg_catalog.pg_trigger g ON f.classid = 'pg_catalog.pg_trigger'::regclass AND g.oid = f.objid
	LEFT JOIN pg_catalog.pg_policy p ON f.classid = 'pg_catalog.pg_policy'::regclass AND p.oid = f.objid
	WHERE f.classid IN ('pg_catalog.pg_rewrite'::regclass, 'pg_catalog.pg_trigger'::regclass,
			'pg_catalog.pg_policy'::regclass, 'pg_catalog.pg_proc'::regclass)
		AND (r.ev_type = '1') IS NOT TRUE
		-- the extension's own
		AND NOT (g.tgname ~ '^~rm_sync_' AND g.tgfoid = 'risky_migrations.sync()'::regprocedure) IS TRUE
		AND g.tgisinternal IS NOT TRUE
		-- clones in partitions
		AND coalesce(g.tgparentid, 0) = 0;
END;
COMMENT ON FUNCTION risky_migrations.column_dependents(oid, smallint[]) IS
	'every view, rule, trigger, policy and function that refers to a column, to the whole row, or to a view that does; a view is its relation, with the longest way down to the table as depth (more than there are views: a circle); the others have depth 0, and the relation they belong to';

CREATE FUNCTION risky_migrations.column_left_behind(relid oid, attnum smallint) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT DISTINCT (pg_catalog.pg_identify_object(d.classid, d.objid, 0)).identity
	FROM risky_migrations.member_columns(column_left_behind.relid, ARRAY[column_left_behind.attnum]) m
	JOIN pg_catalog.pg_depend d ON d.refobjid = m.member AND d.refobjsubid = m.number
	LEFT JOIN pg_catalog.pg_trigger g ON d.classid = 'pg_catalog.pg_trigger'::regclass AND g.oid = d.objid
	LEFT JOIN pg_catalog.pg_attrdef a ON d.classid = 'pg_catalog.pg_attrdef'::regclass AND a.oid = d.objid
	WHERE d.refclassid = 'pg_catalog.pg_class'::regclass
		AND (d.classid IN ('pg_catalog.pg_rewrite'::regclass, 'pg_catalog.pg_trigger'::regclass, 'pg_catalog.pg_policy'::regclass,
				'pg_catalog.pg_proc'::regclass, 'pg_catalog.pg_publication_rel'::regclass)
			-- generated columns
			OR a.adnum <> m.number
			OR d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = m.member AND d.objsubid > 0)
		AND g.tgisinternal IS NOT TRUE
		AND NOT (g.tgname ~ '^~rm_sync_' AND g.tgfoid = 'risky_migrations.sync()'::regprocedure) IS TRUE;
END;
COMMENT ON FUNCTION risky_migrations.column_left_behind(oid, smallint) IS
	'views (by their rule), rules, triggers, policies, functions, publications and generated columns that still refer to a column; after the swap there must be none on the old one';

CREATE FUNCTION risky_migrations.column_relations(relid oid, attnums smallint[]) RETURNS SETOF oid
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT DISTINCT d.relation FROM risky_migrations.column_dependents(column_relations.relid, column_relations.attnums) d
	WHERE d.relation <> column_relations.relid
	ORDER BY 1;
END;
COMMENT ON FUNCTION risky_migrations.column_relations(oid, smallint[]) IS
	'the relations besides the table that column_objects() locks with ACCESS EXCLUSIVE: views, and what rules, triggers and policies belong to; by OID';

-- the statements that make one object again; all in the order to be run in

CREATE FUNCTION risky_migrations.make_grants(relation oid) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH rel AS (
		SELECT c.oid, c.relacl, y.typacl, c.relowner, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		JOIN pg_catalog.pg_type y ON y.oid = c.reltype
		WHERE c.oid = make_grants.relation
	), given AS (
		-- what default privileges may give to the new one, whoever makes it
		SELECT DISTINCT a.grantee FROM pg_catalog.pg_default_acl d, pg_catalog.aclexplode(d.defaclacl) a
		WHERE d.defaclobjtype = 'r'
		UNION
		SELECT d.defaclrole FROM pg_catalog.pg_default_acl d WHERE d.defaclobjtype = 'r'
	), statement AS (
		SELECT 1 AS part, 0 AS att, 0::bigint AS item, false AS is_grantable,
			pg_catalog.format('REVOKE ALL ON TABLE %s FROM %s', r.name,
				CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END) AS sql
		FROM rel r JOIN (
			SELECT grantee FROM given
			UNION SELECT relowner FROM rel WHERE relacl IS NOT NULL OR EXISTS (SELECT FROM given)) g ON true
		UNION ALL
		SELECT 2, 0, i.item, a.is_grantable,
			pg_catalog.format('GRANT %s ON TABLE %s TO %s%s', pg_catalog.string_agg(a.privilege_type, ', '), r.name,
				CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
				CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
		FROM rel r
		CROSS JOIN LATERAL pg_catalog.unnest(coalesce(r.relacl,
			CASE WHEN EXISTS (SELECT FROM given) THEN pg_catalog.acldefault('r', r.relowner) END)) WITH ORDINALITY i (acl, item)
		CROSS JOIN LATERAL pg_catalog.aclexplode(ARRAY[i.acl]) a
		GROUP BY i.item, a.grantee, a.is_grantable, r.name
		UNION ALL
		SELECT 3, t.attnum, i.item, a.is_grantable,
			pg_catalog.format('GRANT %s ON TABLE %s TO %s%s',
				pg_catalog.string_agg(pg_catalog.format('%s (%I)', a.privilege_type, t.attname), ', '), r.name,
				CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
				CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
		FROM rel r
		JOIN pg_catalog.pg_attribute t ON t.attrelid = r.oid AND t.attnum > 0
		CROSS JOIN LATERAL pg_catalog.unnest(t.attacl) WITH ORDINALITY i (acl, item)
		CROSS JOIN LATERAL pg_catalog.aclexplode(ARRAY[i.acl]) a
		GROUP BY t.attnum, i.item, a.grantee, a.is_grantable, r.name
		UNION ALL
		-- nobody dumps the privileges of a row type, but they are there
		SELECT 4, 0, 0, false, pg_catalog.format('REVOKE ALL ON TYPE %s FROM PUBLIC, %s', r.name, r.relowner::regrole)
		FROM rel r WHERE r.typacl IS NOT NULL
		UNION ALL
		SELECT 5, 0, i.item, a.is_grantable,
			pg_catalog.format('GRANT %s ON TYPE %s TO %s%s', a.privilege_type, r.name,
				CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
				CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
		FROM rel r CROSS JOIN LATERAL pg_catalog.unnest(r.typacl) WITH ORDINALITY i (acl, item)
		CROSS JOIN LATERAL pg_catalog.aclexplode(ARRAY[i.acl]) a
	)
	SELECT s.sql FROM statement s ORDER BY s.part, s.att, s.item, s.is_grantable, s.sql COLLATE "C";
END;
COMMENT ON FUNCTION risky_migrations.make_grants(oid) IS
	'the statements that give a new relation the privileges that this one has, whatever default privileges have given it';

CREATE FUNCTION risky_migrations.make_view(view oid, prefix text DEFAULT NULL) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO' SET intervalstyle = 'postgres' SET extra_float_digits = 1
BEGIN ATOMIC
	WITH rel AS (
		SELECT c.oid, c.reltype, c.relowner, c.reloptions, t.reloptions AS toast_options, c.relkind = 'm' AS stored, m.amname, s.spcname,
			CASE c.relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'VIEW' END AS kind,
			n.nspname, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_catalog.pg_class t ON t.oid = c.reltoastrelid
		LEFT JOIN pg_catalog.pg_am m ON m.oid = c.relam
		-- 0 is the database's own, whatever default_tablespace says
		LEFT JOIN pg_catalog.pg_tablespace s ON s.oid = CASE c.reltablespace WHEN 0 THEN
			(SELECT d.dattablespace FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()) ELSE c.reltablespace END
		WHERE c.oid = make_view.view
	), att AS (
		SELECT a.attnum, a.attname, pg_catalog.col_description(a.attrelid, a.attnum) AS comment,
			pg_catalog.pg_get_expr(d.adbin, d.adrelid) AS default_expr, a.attoptions, a.attcompression,
			nullif(a.attstattarget, -1) AS attstattarget, nullif(a.attstorage, y.typstorage) AS attstorage
		FROM rel r JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0
		JOIN pg_catalog.pg_type y ON y.oid = a.atttypid
		LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
	), index AS (
		SELECT i.oid, x.indisunique, x.indisclustered, r.nspname,
			coalesce(make_view.prefix || i.oid, i.relname) AS name,
			pg_catalog.substr(pg_catalog.pg_get_indexdef(i.oid), 1 + pg_catalog.length(pg_catalog.format('CREATE %sINDEX %I ON %s USING ',
				CASE WHEN x.indisunique THEN 'UNIQUE ' ELSE '' END, i.relname, r.name))) AS def,
			coalesce(' WHERE ' || pg_catalog.pg_get_expr(x.indpred, x.indrelid), '') AS pred,
			coalesce(s.spcname, r.spcname) AS spcname
		FROM rel r JOIN pg_catalog.pg_index x ON x.indrelid = r.oid AND x.indislive
		JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
		LEFT JOIN pg_catalog.pg_tablespace s ON s.oid = CASE i.reltablespace WHEN 0 THEN
			(SELECT d.dattablespace FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()) ELSE i.reltablespace END
	), statistic AS (
		SELECT x.oid, n.nspname, coalesce(make_view.prefix || x.oid, x.stxname) AS name, x.stxowner, x.stxstattarget,
			(SELECT pg_catalog.string_agg(CASE y WHEN 'd' THEN 'ndistinct' WHEN 'f' THEN 'dependencies' WHEN 'm' THEN 'mcv' END, ', ')
				FROM pg_catalog.unnest(x.stxkind) y WHERE y <> 'e') AS kinds
		FROM rel r JOIN pg_catalog.pg_statistic_ext x ON x.stxrelid = r.oid
		JOIN pg_catalog.pg_namespace n ON n.oid = x.stxnamespace
	), statement AS (
		SELECT 1 AS part, 0::bigint AS n, pg_catalog.concat('CREATE ', r.kind, ' ', r.name,
			' (' || (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM att a) || ')',
			CASE WHEN r.stored THEN pg_catalog.format(' USING %I', r.amname) END,
			' WITH (' || (SELECT pg_catalog.string_agg(pg_catalog.format('%s%I = %L', o.prefix, o.option_name, o.option_value), ', ')
				FROM (SELECT '' AS prefix, x.* FROM pg_catalog.pg_options_to_table(r.reloptions) x
					UNION ALL
					SELECT 'toast.', x.* FROM pg_catalog.pg_options_to_table(r.toast_options) x) o) || ')',
			CASE WHEN r.stored THEN pg_catalog.format(' TABLESPACE %I', r.spcname) END,
			' AS ', pg_catalog.rtrim(pg_catalog.pg_get_viewdef(r.oid), ';'),
			CASE WHEN r.stored THEN ' WITH NO DATA' END) AS sql
		FROM rel r
		UNION ALL
		SELECT 2, 0, pg_catalog.format('ALTER %s %s OWNER TO %s', r.kind, r.name, r.relowner::regrole) FROM rel r
		UNION ALL
		SELECT 3, g.n, g.sql FROM rel r
		CROSS JOIN LATERAL ROWS FROM (risky_migrations.make_grants(r.oid)) WITH ORDINALITY g (sql, n)
		UNION ALL
		SELECT 4, a.attnum, pg_catalog.format('ALTER VIEW %s ALTER COLUMN %I SET DEFAULT %s', r.name, a.attname, a.default_expr)
		FROM rel r, att a WHERE a.default_expr IS NOT NULL
		UNION ALL
		-- what only a materialized view has: settings of columns, indexes, statistics
		SELECT 4, a.attnum, pg_catalog.format('ALTER MATERIALIZED VIEW %s ALTER COLUMN %I SET %s', r.name, a.attname, x.setting)
		FROM rel r, att a CROSS JOIN LATERAL (VALUES
			('STATISTICS ' || a.attstattarget),
			('STORAGE ' || CASE a.attstorage WHEN 'p' THEN 'PLAIN' WHEN 'm' THEN 'MAIN' WHEN 'e' THEN 'EXTERNAL' ELSE 'EXTENDED' END),
			('COMPRESSION ' || CASE a.attcompression WHEN 'p' THEN 'pglz' WHEN 'l' THEN 'lz4' END),
			('(' || (SELECT pg_catalog.string_agg(pg_catalog.format('%I = %L', o.option_name, o.option_value), ', ')
				FROM pg_catalog.pg_options_to_table(a.attoptions) o) || ')')) x (setting)
		WHERE r.stored AND x.setting IS NOT NULL AND (a.attstorage IS NOT NULL OR x.setting NOT LIKE 'STORAGE %')
		UNION ALL
		SELECT 5, i.oid, x.sql
		FROM rel r, index i CROSS JOIN LATERAL (
			SELECT pg_catalog.format('CREATE %sINDEX %I ON %s USING %s TABLESPACE %I%s', CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END,
				i.name, r.name, pg_catalog.left(i.def, pg_catalog.length(i.def) - pg_catalog.length(i.pred)), i.spcname, i.pred)
			UNION ALL
			SELECT pg_catalog.format('ALTER INDEX %I.%I ALTER COLUMN %s SET STATISTICS %s', i.nspname, i.name, a.attnum, a.attstattarget)
			FROM pg_catalog.pg_attribute a WHERE a.attrelid = i.oid AND a.attstattarget >= 0
			UNION ALL
			SELECT pg_catalog.format('COMMENT ON INDEX %I.%I IS %L', i.nspname, i.name, pg_catalog.obj_description(i.oid, 'pg_class'))
			WHERE pg_catalog.obj_description(i.oid, 'pg_class') IS NOT NULL
			UNION ALL
			SELECT pg_catalog.format('ALTER INDEX %I.%I DEPENDS ON EXTENSION %I', i.nspname, i.name, e.extname)
			FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
			WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = i.oid
				AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'x'
			UNION ALL
			SELECT pg_catalog.format('ALTER MATERIALIZED VIEW %s CLUSTER ON %I', r.name, i.name) WHERE i.indisclustered) x (sql)
		UNION ALL
		SELECT 6, x.oid, y.sql
		FROM rel r, statistic x CROSS JOIN LATERAL (VALUES
			(pg_catalog.format('CREATE STATISTICS %I.%I%s ON %s FROM %s', x.nspname, x.name, ' (' || x.kinds || ')',
				pg_catalog.pg_get_statisticsobjdef_columns(x.oid), r.name)),
			(pg_catalog.format('ALTER STATISTICS %I.%I OWNER TO %s', x.nspname, x.name, x.stxowner::regrole)),
			(CASE WHEN x.stxstattarget >= 0 THEN
				pg_catalog.format('ALTER STATISTICS %I.%I SET STATISTICS %s', x.nspname, x.name, x.stxstattarget) END),
			('COMMENT ON STATISTICS ' || pg_catalog.format('%I.%I IS ', x.nspname, x.name)
				|| pg_catalog.quote_literal(pg_catalog.obj_description(x.oid, 'pg_statistic_ext')))) y (sql)
		WHERE y.sql IS NOT NULL
		UNION ALL
		SELECT 7, 0, pg_catalog.format('COMMENT ON %s %s IS %L', r.kind, r.name, pg_catalog.obj_description(r.oid, 'pg_class'))
		FROM rel r WHERE pg_catalog.obj_description(r.oid, 'pg_class') IS NOT NULL
		UNION ALL
		SELECT 7, a.attnum, pg_catalog.format('COMMENT ON COLUMN %s.%I IS %L', r.name, a.attname, a.comment)
		FROM rel r, att a WHERE a.comment IS NOT NULL
		UNION ALL
		SELECT 8, 0, pg_catalog.format('COMMENT ON TYPE %s IS %L', r.name, pg_catalog.obj_description(r.reltype, 'pg_type'))
		FROM rel r WHERE pg_catalog.obj_description(r.reltype, 'pg_type') IS NOT NULL
		UNION ALL
		SELECT 8, 1, pg_catalog.format('COMMENT ON RULE %I ON %s IS %L', w.rulename, r.name, pg_catalog.obj_description(w.oid, 'pg_rewrite'))
		FROM rel r JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.oid AND w.ev_type = '1'
		WHERE pg_catalog.obj_description(w.oid, 'pg_rewrite') IS NOT NULL
		UNION ALL
		SELECT 9, l.objsubid, pg_catalog.format('SECURITY LABEL FOR %I ON %s %s%s IS %L', l.provider,
			CASE l.objsubid WHEN 0 THEN r.kind ELSE 'COLUMN' END, r.name,
			(SELECT '.' || pg_catalog.quote_ident(a.attname) FROM att a WHERE a.attnum = l.objsubid), l.label)
		FROM rel r JOIN pg_catalog.pg_seclabel l ON l.classoid = 'pg_catalog.pg_class'::regclass AND l.objoid = r.oid
		UNION ALL
		SELECT 9, 0, pg_catalog.format('SECURITY LABEL FOR %I ON TYPE %s IS %L', l.provider, r.name, l.label)
		FROM rel r JOIN pg_catalog.pg_seclabel l ON l.classoid = 'pg_catalog.pg_type'::regclass AND l.objoid = r.reltype
		UNION ALL
		SELECT 9, 0, pg_catalog.format('ALTER MATERIALIZED VIEW %s DEPENDS ON EXTENSION %I', r.name, e.extname)
		FROM rel r JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = r.oid AND d.objsubid = 0
			AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'x'
		JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
		WHERE r.stored
	)
	SELECT pg_catalog.array_agg(s.sql ORDER BY s.part, s.n,
		-- an index or a statistics object, before what it has
		s.sql NOT LIKE 'CREATE %', s.sql COLLATE "C") FROM statement s;
END;
COMMENT ON FUNCTION risky_migrations.make_view(oid, text) IS
	'the statements that make a view again: options, owner, privileges, defaults, comments, security labels; not its rules and triggers.  A materialized view is made without its rows, with its indexes and statistics, which are called prefix and their former OID if a prefix is given';

CREATE FUNCTION risky_migrations.make_rule(rule oid) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO' SET intervalstyle = 'postgres' SET extra_float_digits = 1
BEGIN ATOMIC
	SELECT pg_catalog.array_remove(ARRAY[
		pg_catalog.pg_get_ruledef(w.oid),
		CASE w.ev_enabled WHEN 'O' THEN NULL ELSE pg_catalog.format('ALTER TABLE %s %s RULE %I', w.ev_class::regclass,
			CASE w.ev_enabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, w.rulename) END,
		'COMMENT ON RULE ' || pg_catalog.quote_ident(w.rulename) || ' ON ' || w.ev_class::regclass::text || ' IS '
			|| pg_catalog.quote_literal(pg_catalog.obj_description(w.oid, 'pg_rewrite'))], NULL)
	FROM pg_catalog.pg_rewrite w WHERE w.oid = make_rule.rule;
END;
COMMENT ON FUNCTION risky_migrations.make_rule(oid) IS
	'the statements that make a rule again: with its state and comment';

CREATE FUNCTION risky_migrations.make_trigger(trigger oid) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO' SET intervalstyle = 'postgres' SET extra_float_digits = 1
BEGIN ATOMIC
	SELECT pg_catalog.array_remove(ARRAY[
		pg_catalog.pg_get_triggerdef(g.oid),
		CASE g.tgenabled WHEN 'O' THEN NULL ELSE pg_catalog.format('ALTER TABLE %s %s TRIGGER %I', g.tgrelid::regclass,
			CASE g.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, g.tgname) END,
		'COMMENT ON TRIGGER ' || pg_catalog.quote_ident(g.tgname) || ' ON ' || g.tgrelid::regclass::text || ' IS '
			|| pg_catalog.quote_literal(pg_catalog.obj_description(g.oid, 'pg_trigger')),
		'COMMENT ON CONSTRAINT ' || pg_catalog.quote_ident(g.tgname) || ' ON ' || g.tgrelid::regclass::text || ' IS '
			|| pg_catalog.quote_literal(pg_catalog.obj_description(g.tgconstraint, 'pg_constraint'))], NULL)
		|| ARRAY(SELECT pg_catalog.format('ALTER TRIGGER %I ON %s DEPENDS ON EXTENSION %I', g.tgname, g.tgrelid::regclass, e.extname)
			FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
			WHERE d.classid = 'pg_catalog.pg_trigger'::regclass AND d.objid = g.oid
				AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'x' ORDER BY e.extname)
		-- clones in partitions that are not as the parent's
		|| ARRAY(WITH RECURSIVE clone (oid) AS (
				SELECT x.oid FROM pg_catalog.pg_trigger x WHERE x.tgparentid = g.oid
				UNION ALL
				SELECT x.oid FROM clone y JOIN pg_catalog.pg_trigger x ON x.tgparentid = y.oid)
			SELECT s.sql FROM clone y JOIN pg_catalog.pg_trigger x ON x.oid = y.oid
			CROSS JOIN LATERAL (VALUES
				(CASE WHEN x.tgenabled <> g.tgenabled THEN pg_catalog.format('ALTER TABLE ONLY %s %s TRIGGER %I', x.tgrelid::regclass,
					CASE x.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' WHEN 'A' THEN 'ENABLE ALWAYS' ELSE 'ENABLE' END, x.tgname) END),
				('COMMENT ON TRIGGER ' || pg_catalog.quote_ident(x.tgname) || ' ON ' || x.tgrelid::regclass::text || ' IS '
					|| pg_catalog.quote_literal(pg_catalog.obj_description(x.oid, 'pg_trigger')))) s (sql)
			WHERE s.sql IS NOT NULL ORDER BY x.tgrelid, s.sql COLLATE "C")
	FROM pg_catalog.pg_trigger g WHERE g.oid = make_trigger.trigger;
END;
COMMENT ON FUNCTION risky_migrations.make_trigger(oid) IS
	'the statements that make a trigger again: with its state, comments, and the extensions it depends on, also of its clones in partitions';

CREATE FUNCTION risky_migrations.make_policy(policy oid) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO' SET intervalstyle = 'postgres' SET extra_float_digits = 1
BEGIN ATOMIC
	SELECT pg_catalog.array_remove(ARRAY[
		pg_catalog.concat('CREATE POLICY ', pg_catalog.quote_ident(p.polname), ' ON ', p.polrelid::regclass::text,
			' AS ', CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
			' FOR ', CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
				WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
			' TO ', (SELECT pg_catalog.string_agg(CASE o.role WHEN 0 THEN 'PUBLIC' ELSE o.role::regrole::text END, ', ' ORDER BY o.n)
				FROM pg_catalog.unnest(p.polroles) WITH ORDINALITY o (role, n)),
			' USING (' || pg_catalog.pg_get_expr(p.polqual, p.polrelid) || ')',
			' WITH CHECK (' || pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid) || ')'),
		'COMMENT ON POLICY ' || pg_catalog.quote_ident(p.polname) || ' ON ' || p.polrelid::regclass::text || ' IS '
			|| pg_catalog.quote_literal(pg_catalog.obj_description(p.oid, 'pg_policy'))], NULL)
	FROM pg_catalog.pg_policy p WHERE p.oid = make_policy.policy;
END;
COMMENT ON FUNCTION risky_migrations.make_policy(oid) IS
	'the statements that make a policy again: with its comment';

CREATE FUNCTION risky_migrations.column_publications(relid oid, attnums smallint[])
RETURNS TABLE (kind text, objid oid, publication name, owner oid, drop_sql text, make_sql text[])
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO' SET intervalstyle = 'postgres' SET extra_float_digits = 1
BEGIN ATOMIC
	SELECT DISTINCT ON (r.oid) x.kind, r.oid, p.pubname, p.pubowner,
		pg_catalog.format('ALTER PUBLICATION %I DROP TABLE ONLY %s', p.pubname, r.prrelid::regclass),
		ARRAY[pg_catalog.concat(pg_catalog.format('ALTER PUBLICATION %I ADD TABLE ONLY %s', p.pubname, r.prrelid::regclass),
			' (' || (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ' ORDER BY a.attnum)
				FROM pg_catalog.pg_attribute a WHERE a.attrelid = r.prrelid AND a.attnum = ANY (r.prattrs::smallint[])) || ')',
			' WHERE (' || pg_catalog.pg_get_expr(r.prqual, r.prrelid) || ')')]
	FROM risky_migrations.member_columns(column_publications.relid, column_publications.attnums) m
	JOIN pg_catalog.pg_publication_rel r ON r.prrelid = m.member
	JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid
	CROSS JOIN LATERAL (SELECT CASE
		WHEN r.prqual IS NOT NULL AND EXISTS (SELECT FROM pg_catalog.pg_depend d
			WHERE d.classid = 'pg_catalog.pg_publication_rel'::regclass AND d.objid = r.oid
				AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = m.member AND d.refobjsubid = m.number
				-- the list has a dependency of its own
				AND (m.number = ANY (r.prattrs::smallint[]) IS NOT TRUE
					OR r.prqual::text ~ pg_catalog.format(':varattno %s ', m.number)))
			THEN 'publication row filter'
		WHEN m.number = ANY (r.prattrs::smallint[]) THEN 'publication column list' END) x (kind)
	WHERE x.kind IS NOT NULL
	ORDER BY r.oid, x.kind DESC;
END;
COMMENT ON FUNCTION risky_migrations.column_publications(oid, smallint[]) IS
	'publications whose condition uses one of these columns, or else whose list has one, with the statements that take the table out and put it in again';

CREATE FUNCTION risky_migrations.column_objects(relid oid, attnums smallint[])
RETURNS TABLE (ord integer, kind text, name text, drop_sql text, make_sql text[], relation oid)
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH used AS MATERIALIZED (
		SELECT u.classid, u.objid, u.depth FROM risky_migrations.column_dependents(column_objects.relid, column_objects.attnums) u
	), view AS (
		SELECT u.objid, u.depth, CASE c.relkind WHEN 'm' THEN 'materialized view' ELSE 'view' END AS kind
		FROM used u JOIN pg_catalog.pg_class c ON c.oid = u.objid
		WHERE u.classid = 'pg_catalog.pg_class'::regclass AND u.depth > 0 AND c.relkind IN ('v', 'm')
	), object AS (
		-- nothing depends on the first four
		SELECT 'pg_catalog.pg_publication_rel'::regclass AS classid, p.objid, 0 AS part, 0 AS depth, p.kind, p.drop_sql, p.make_sql
		FROM risky_migrations.column_publications(column_objects.relid, column_objects.attnums) p
		UNION ALL
		SELECT u.classid, u.objid, 1 AS part, 0 AS depth, 'policy' AS kind,
			pg_catalog.format('DROP POLICY %I ON %s', p.polname, p.polrelid::regclass) AS drop_sql,
			risky_migrations.make_policy(p.oid) AS make_sql
		FROM used u JOIN pg_catalog.pg_policy p ON u.classid = 'pg_catalog.pg_policy'::regclass AND p.oid = u.objid
		UNION ALL
		SELECT 'pg_catalog.pg_trigger'::regclass, g.oid, 2, 0, 'trigger',
			pg_catalog.format('DROP TRIGGER %I ON %s', g.tgname, g.tgrelid::regclass),
			risky_migrations.make_trigger(g.oid)
		FROM pg_catalog.pg_trigger g
		WHERE g.oid IN (SELECT u.objid FROM used u WHERE u.classid = 'pg_catalog.pg_trigger'::regclass)
			OR g.tgrelid IN (SELECT v.objid FROM view v) AND NOT g.tgisinternal
		UNION ALL
		SELECT 'pg_catalog.pg_rewrite'::regclass, w.oid, 3, 0, 'rule',
			pg_catalog.format('DROP RULE %I ON %s', w.rulename, w.ev_class::regclass),
			risky_migrations.make_rule(w.oid)
		FROM pg_catalog.pg_rewrite w
		WHERE w.ev_type <> '1' AND (w.ev_class IN (SELECT v.objid FROM view v)
			OR w.oid IN (SELECT u.objid FROM used u WHERE u.classid = 'pg_catalog.pg_rewrite'::regclass))
		UNION ALL
		SELECT 'pg_catalog.pg_class'::regclass, v.objid, 4, v.depth, v.kind,
			pg_catalog.format('DROP %s %s', pg_catalog.upper(v.kind), v.objid::regclass), risky_migrations.make_view(v.objid)
		FROM view v
	)
	SELECT pg_catalog.row_number() OVER (ORDER BY o.part, o.depth DESC, i.identity COLLATE "C")::integer,
		o.kind, i.identity, o.drop_sql, o.make_sql, CASE o.part WHEN 4 THEN o.objid END
	FROM object o, LATERAL pg_catalog.pg_identify_object(o.classid, o.objid, 0) i
	ORDER BY 1;
END;
COMMENT ON FUNCTION risky_migrations.column_objects(oid, smallint[]) IS
	'the publications, policies, triggers, rules and views that a column cannot be exchanged under: to be dropped by ord, and made again the other way round, each by its statements in order; a view with its OID.  A materialized view is made empty: column_copies() knows better';

-- A materialized view stores what it has read, and filling it takes time.  So,
-- as indexes are, it is made anew beside the one that everybody reads, under a name of
-- ours, together with the views that it reads; see matviews.c.
CREATE FUNCTION risky_migrations.column_copies(relid oid, attnum smallint, prefix text)
RETURNS TABLE (ord integer, name text, relation oid, copy_name text, aside_sql text, make_sql text[], wait_sql text[],
	fill_sql text, take_sql text[], state text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE view AS MATERIALIZED (
		SELECT u.objid AS oid, u.depth, c.relname, c.reltype, c.relkind, c.relispopulated, c.xmin, n.nspname,
			CASE c.relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'VIEW' END AS kind
		FROM risky_migrations.column_dependents(column_copies.relid, ARRAY[column_copies.attnum]) u
		JOIN pg_catalog.pg_class c ON c.oid = u.objid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE u.classid = 'pg_catalog.pg_class'::regclass AND u.depth > 0
	), reads AS MATERIALIZED (
		SELECT DISTINCT w.ev_class AS reader, v.oid AS source
		FROM view v JOIN pg_catalog.pg_type y ON y.oid = v.reltype
		CROSS JOIN LATERAL (VALUES ('pg_catalog.pg_class'::regclass, v.oid),
			('pg_catalog.pg_type'::regclass, y.oid), ('pg_catalog.pg_type'::regclass, y.typarray)) x (classid, objid)
		JOIN pg_catalog.pg_depend d ON d.refclassid = x.classid AND d.refobjid = x.objid
			AND d.classid = 'pg_catalog.pg_rewrite'::regclass
		JOIN pg_catalog.pg_rewrite w ON w.oid = d.objid AND w.ev_type = '1' AND w.ev_class <> v.oid
	), needed (oid) AS (
		SELECT v.oid FROM view v WHERE v.relkind = 'm'
		UNION
		SELECT r.source FROM needed n JOIN reads r ON r.reader = n.oid
	), copied AS (
		SELECT v.*, column_copies.prefix || v.oid AS copy,
			-- out of the way for a moment
			overlay(column_copies.prefix PLACING 'x' FROM 4 FOR 1) || v.oid AS aside,
			risky_migrations.make_view(v.oid, column_copies.prefix) AS make
		FROM view v WHERE v.oid IN (SELECT n.oid FROM needed n)
	)
	SELECT pg_catalog.row_number() OVER (ORDER BY c.depth, c.nspname, c.relname)::integer, pg_catalog.format('%I.%I', c.nspname, c.relname),
		c.oid, c.copy,
		pg_catalog.format('ALTER %s %I.%I RENAME TO %I', c.kind, c.nspname, c.relname, c.aside),
		c.make,
		ARRAY[pg_catalog.format('ALTER %s %I.%I RENAME TO %I', c.kind, c.nspname, c.relname, c.copy),
			pg_catalog.format('ALTER %s %I.%I RENAME TO %I', c.kind, c.nspname, c.aside, c.relname)],
		CASE WHEN c.relispopulated AND c.relkind = 'm' THEN pg_catalog.format('REFRESH MATERIALIZED VIEW %I.%I', c.nspname, c.copy) END,
		ARRAY[pg_catalog.format('ALTER %s %I.%I RENAME TO %I', c.kind, c.nspname, c.copy, c.relname)]
			|| ARRAY(SELECT pg_catalog.format('ALTER INDEX %I.%I RENAME TO %I', c.nspname, column_copies.prefix || i.oid, i.relname)
				FROM pg_catalog.pg_index x JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
				WHERE x.indrelid = c.oid AND x.indislive ORDER BY i.oid)
			|| ARRAY(SELECT pg_catalog.format('ALTER STATISTICS %I.%I RENAME TO %I', n.nspname, column_copies.prefix || x.oid, x.stxname)
				FROM pg_catalog.pg_statistic_ext x JOIN pg_catalog.pg_namespace n ON n.oid = x.stxnamespace
				WHERE x.stxrelid = c.oid ORDER BY x.oid),
		-- REFRESH writes the row of pg_class, also CONCURRENTLY; VACUUM and ANALYZE overwrite it
		pg_catalog.format('%s/%s/%s/%s', c.oid, c.xmin, c.relispopulated, pg_catalog.md5(pg_catalog.array_to_string(c.make, ';')))
	FROM copied c
	ORDER BY 1;
END;
COMMENT ON FUNCTION risky_migrations.column_copies(oid, smallint, text) IS
	'the materialized views that read a column, and the views below them, which come first: the statements that get each out of the way, make another one in its place, give that the name in which it waits, fill it, and give it the names that it has in force; the state changes with each REFRESH and with every change of the definition';

CREATE FUNCTION risky_migrations.copies_there(relid oid, prefix text)
RETURNS TABLE (ord bigint, relation oid, populated boolean, drop_sql text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH RECURSIVE named AS MATERIALIZED (
		SELECT c.oid, c.relname, c.relkind, c.reltype, y.typarray, c.relispopulated, n.nspname
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		JOIN pg_catalog.pg_type y ON y.oid = c.reltype
		WHERE pg_catalog.starts_with(c.relname, copies_there.prefix) AND c.relkind IN ('v', 'm')
	), copy (oid, depth) AS (
		SELECT n.oid, 1 FROM named n
		JOIN pg_catalog.pg_rewrite w ON w.ev_class = n.oid
		JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.objid = w.oid
			AND d.refclassid = 'pg_catalog.pg_class'::regclass
		WHERE d.refobjid IN (SELECT m FROM risky_migrations.members(copies_there.relid) m)
		UNION
		SELECT w.ev_class, c.depth + 1
		FROM copy c JOIN named n ON n.oid = c.oid
		CROSS JOIN LATERAL (VALUES ('pg_catalog.pg_class'::regclass, n.oid),
			('pg_catalog.pg_type'::regclass, n.reltype), ('pg_catalog.pg_type'::regclass, n.typarray)) x (classid, objid)
		JOIN pg_catalog.pg_depend d ON d.refclassid = x.classid AND d.refobjid = x.objid
			AND d.classid = 'pg_catalog.pg_rewrite'::regclass
		JOIN pg_catalog.pg_rewrite w ON w.oid = d.objid AND w.ev_class <> n.oid
		WHERE w.ev_class IN (SELECT o.oid FROM named o) AND c.depth < (SELECT pg_catalog.count(*) FROM named)
	)
	SELECT pg_catalog.row_number() OVER (ORDER BY pg_catalog.max(c.depth) DESC, n.oid), n.oid, n.relispopulated,
		pg_catalog.format('DROP %s %I.%I', CASE n.relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'VIEW' END, n.nspname, n.relname)
	FROM copy c JOIN named n ON n.oid = c.oid
	GROUP BY n.oid, n.relispopulated, n.relkind, n.nspname, n.relname
	ORDER BY 1;
END;
COMMENT ON FUNCTION risky_migrations.copies_there(oid, text) IS
	'the copies of materialized views and of views below them that wait under their names, in the order in which they can be dropped';


CREATE FUNCTION risky_migrations.column_obstacles(relid oid, attnum smallint)
RETURNS TABLE (kind text, name text, reason text, hint text)
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH target AS (
		SELECT c.oid, c.relnamespace, c.reltype, y.typarray, c.reloftype, c.relkind, c.relispartition,
			c.relpersistence, c.relreplident, m.number AS attnum,
			-- FROM s.t x(a, b)
			pg_catalog.regexp_replace(pg_catalog.format('%I.%I', n.nspname, c.relname), '[^[:alnum:]_]', '\\\&', 'g')
				|| ' ("([^"]|"")+"|[[:alnum:]_$]+)\(' AS alias_list
		FROM risky_migrations.member_columns(column_obstacles.relid, ARRAY[column_obstacles.attnum]) m
		JOIN pg_catalog.pg_class c ON c.oid = m.member
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_catalog.pg_type y ON y.oid = c.reltype
	), used AS MATERIALIZED (
		SELECT u.classid, u.objid, u.relation, u.depth
		FROM risky_migrations.column_dependents(column_obstacles.relid, ARRAY[column_obstacles.attnum]) u
	), view AS (
		SELECT c.oid, c.relnamespace, c.relowner, c.relacl, c.relkind, c.relpersistence, c.reltype, y.typarray, u.depth
		FROM used u JOIN pg_catalog.pg_class c ON c.oid = u.objid JOIN pg_catalog.pg_type y ON y.oid = c.reltype
		WHERE u.classid = 'pg_catalog.pg_class'::regclass AND u.depth > 0
	), definition AS (
		SELECT 'pg_catalog.pg_class'::regclass::oid AS classid, v.oid AS objid,
			pg_catalog.pg_get_viewdef(v.oid) AS sql, w.ev_action::text AS tree
		FROM view v JOIN pg_catalog.pg_rewrite w ON w.ev_class = v.oid AND w.ev_type = '1'
		UNION ALL
		SELECT u.classid, u.objid, pg_catalog.pg_get_ruledef(w.oid), pg_catalog.concat(w.ev_action::text, w.ev_qual::text)
		FROM used u JOIN pg_catalog.pg_rewrite w ON u.classid = 'pg_catalog.pg_rewrite'::regclass AND w.oid = u.objid
		UNION ALL
		SELECT u.classid, u.objid, pg_catalog.concat(pg_catalog.pg_get_expr(p.polqual, p.polrelid), ' ',
			pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid)), pg_catalog.concat(p.polqual::text, p.polwithcheck::text)
		FROM used u JOIN pg_catalog.pg_policy p ON u.classid = 'pg_catalog.pg_policy'::regclass AND p.oid = u.objid
		UNION ALL
		SELECT u.classid, u.objid, '', g.tgqual::text
		FROM used u JOIN pg_catalog.pg_trigger g ON u.classid = 'pg_catalog.pg_trigger'::regclass AND g.oid = u.objid
	), in_use (relation) AS (
		SELECT u.relation FROM used u WHERE u.classid <> 'pg_catalog.pg_proc'::regclass
	), publication AS (
		SELECT p.pubname, r.prattrs, t.relreplident
		FROM target t CROSS JOIN pg_catalog.pg_publication p
		LEFT JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = t.oid
		WHERE t.relpersistence = 'p' AND (r.oid IS NOT NULL OR p.puballtables
			OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace s WHERE s.pnpubid = p.oid AND s.pnnspid = t.relnamespace))
	), obstacle (kind, classid, objid, objsubid, reason) AS (
		-- what reads the column
		SELECT CASE WHEN v.relkind = 'm' THEN 'materialized view' ELSE 'temporary view' END,
			'pg_catalog.pg_class'::regclass::oid, v.oid, 0,
			CASE WHEN v.relkind = 'm' THEN 'it stores what it has read' ELSE 'it belongs to a session' END
		FROM view v WHERE v.relkind <> 'v' OR v.relpersistence = 't'
		UNION ALL
		SELECT 'circular view', 'pg_catalog.pg_class'::regclass, v.oid, 0, 'it stands on itself'
		FROM view v WHERE v.depth > (SELECT pg_catalog.count(*) FROM view)
		UNION ALL
		SELECT 'function', u.classid, u.objid, 0,
			CASE WHEN p.prosqlbody IS NULL THEN 'its arguments or its result are of the row type of a view that has to be made anew'
				ELSE 'its body refers to the column by number, or to a view that has to be made anew' END
		FROM used u JOIN pg_catalog.pg_proc p ON u.classid = 'pg_catalog.pg_proc'::regclass AND p.oid = u.objid
		UNION ALL
		SELECT 'function', d.classid, d.objid, 0, 'its body is in SQL, and its arguments or its result are of the row type of the table'
		FROM target t JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_type'::regclass AND d.refobjid IN (t.reltype, t.typarray)
		JOIN pg_catalog.pg_proc p ON d.classid = 'pg_catalog.pg_proc'::regclass AND p.oid = d.objid
		WHERE p.prosqlbody IS NOT NULL AND p.oid NOT IN (SELECT u.objid FROM used u WHERE u.classid = 'pg_catalog.pg_proc'::regclass)
		UNION ALL
		SELECT 'column alias list', f.classid, f.objid, 0, 'it knows columns of the table by their position'
		FROM target t, definition f
		WHERE f.sql ~ t.alias_list
			-- (t JOIN u ...) j(a, b)
			OR f.tree ~ ':colnames \("[^{}]*\)\} :eref \{ALIAS :aliasname [^{}]*\} :rtekind 2 '
			-- rows of the table from a function
			OR f.tree ~ pg_catalog.format('RANGETBLFUNCTION :funcexpr \{FUNCEXPR :funcid \d+ :funcresulttype %s ', t.reltype)
		UNION ALL
		SELECT 'row constructor', f.classid, f.objid, 0, 'it makes rows of the row type of the table'
		FROM target t, definition f WHERE f.tree ~ pg_catalog.format(':row_typeid %s ', t.reltype)
		UNION ALL
		-- the table itself
		SELECT 'generated column', 'pg_catalog.pg_class'::regclass, t.oid, coalesce(a.adnum, d.objsubid), 'it is generated from the column'
		FROM target t JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_class'::regclass
			AND d.refobjid = t.oid AND d.refobjsubid = t.attnum
		LEFT JOIN pg_catalog.pg_attrdef a ON d.classid = 'pg_catalog.pg_attrdef'::regclass AND a.oid = d.objid
		WHERE a.adrelid = t.oid AND a.adnum <> t.attnum
			OR d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = t.oid AND d.objsubid > 0
		UNION ALL
		SELECT 'typed table', 'pg_catalog.pg_type'::regclass, t.reloftype, 0, 'its columns are those of the type'
		FROM target t WHERE t.reloftype <> 0
		UNION ALL
		SELECT 'partition', 'pg_catalog.pg_class'::regclass, t.oid, 0,
			'it is a partition'
		FROM target t WHERE t.relispartition AND t.oid = column_obstacles.relid
		UNION ALL
		SELECT 'partition key', 'pg_catalog.pg_class'::regclass, t.oid, t.attnum, 'its values say where a row is stored'
		FROM target t JOIN pg_catalog.pg_partitioned_table p ON p.partrelid = t.oid
		-- also in an expression: the column depends on its table
		WHERE t.attnum = ANY (p.partattrs::smallint[]) OR EXISTS (SELECT FROM pg_catalog.pg_depend d
			WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = t.oid AND d.objsubid = t.attnum
				AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = t.oid AND d.refobjsubid = 0 AND d.deptype = 'i')
		UNION ALL
		SELECT 'inherited column', 'pg_catalog.pg_class'::regclass, h.inhparent, 0, 'the column is inherited from it'
		FROM target t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = t.attnum
		JOIN pg_catalog.pg_inherits h ON h.inhrelid = t.oid
		JOIN pg_catalog.pg_attribute b ON b.attrelid = h.inhparent AND b.attname = a.attname
		WHERE t.oid = column_obstacles.relid AND NOT t.relispartition
		UNION ALL
		SELECT 'child table', 'pg_catalog.pg_class'::regclass, t.oid, 0, x.reason
		FROM target t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = t.attnum
		JOIN pg_catalog.pg_class c ON c.oid = t.oid
		JOIN pg_catalog.pg_class r ON r.oid = column_obstacles.relid AND r.relkind = 'r'
		CROSS JOIN LATERAL (VALUES (t.relkind <> 'r', 'it is no ordinary table'),
			(t.relpersistence = 't' AND r.relpersistence <> 't', 'it belongs to a session'),
			(c.relowner <> r.relowner, 'it has another owner'),
			(a.attinhcount > 1, 'it inherits the column from several tables')) x (applies, reason)
		WHERE t.oid <> column_obstacles.relid AND x.applies
		UNION ALL
		SELECT 'row type', d.classid, d.objid, d.objsubid, 'it is of the row type of the table'
		FROM target t JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_type'::regclass AND d.refobjid IN (t.reltype, t.typarray)
		LEFT JOIN pg_catalog.pg_class c ON d.classid = 'pg_catalog.pg_class'::regclass AND c.oid = d.objid
		LEFT JOIN pg_catalog.pg_type y ON d.classid = 'pg_catalog.pg_type'::regclass AND y.oid = d.objid
		WHERE c.relkind IN ('r', 'p', 'm', 'f', 'c') OR y.typtype IN ('d', 'r')
		UNION ALL
		SELECT 'exclusion constraint', 'pg_catalog.pg_constraint'::regclass, k.oid, 0, 'its index cannot be built beside writers'
		FROM target t JOIN pg_catalog.pg_constraint k ON k.conrelid = t.oid
		JOIN pg_catalog.pg_index i ON i.indexrelid = k.conindid AND i.indrelid = t.oid
		WHERE i.indisexclusion AND (t.attnum = ANY (k.conkey) OR EXISTS (SELECT FROM pg_catalog.pg_depend d
			WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = i.indexrelid
				AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = t.oid AND d.refobjsubid = t.attnum))
		UNION ALL
		SELECT 'deferrable constraint', 'pg_catalog.pg_constraint'::regclass, k.oid, 0,
			'while its index is built, rows would be refused that it lets pass until the end of a transaction'
		FROM target t JOIN pg_catalog.pg_constraint k ON k.conrelid = t.oid AND k.contype IN ('p', 'u')
		WHERE k.condeferrable AND t.attnum = ANY (k.conkey) AND k.conparentid = 0
		UNION ALL
		SELECT 'foreign key', 'pg_catalog.pg_constraint'::regclass, k.oid, 0, x.reason
		FROM target t
		JOIN pg_catalog.pg_constraint k ON k.contype = 'f' AND k.conparentid = 0
			AND (k.conrelid = t.oid AND t.attnum = ANY (k.conkey) OR k.confrelid = t.oid AND t.attnum = ANY (k.confkey))
		JOIN pg_catalog.pg_class c ON c.oid IN (k.conrelid, k.confrelid)
		CROSS JOIN LATERAL (VALUES
			(k.conrelid = c.oid AND c.relkind = 'p' AND c.oid NOT IN (SELECT m.oid FROM target m),
				'the table that refers is partitioned'),
			(k.confrelid = t.oid AND t.relkind = 'p' AND k.conrelid = c.oid AND c.oid = t.oid,
				'the partitioned table refers to itself'),
			(k.conrelid <> k.confrelid AND c.oid = k.conrelid AND t.oid = k.confrelid
				AND k.conrelid IN (SELECT m.oid FROM target m), CASE WHEN c.relispartition
					THEN 'it refers to a partition of the same table' ELSE 'it refers to another table of the same tree' END),
			(NOT pg_catalog.pg_has_role(c.relowner, 'USAGE'),
				pg_catalog.format('role %I is not an owner of the table at its other end', current_user))) x (applies, reason)
		WHERE x.applies
		UNION ALL
		SELECT DISTINCT 'passed on privileges', 'pg_catalog.pg_class'::regclass::oid, t.oid, t.attnum::integer,
			pg_catalog.format('role %s, not its owner, has granted some', e.grantor::regrole)
		FROM target t JOIN pg_catalog.pg_class c ON c.oid = t.oid
		JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = t.attnum
		CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) e
		WHERE e.grantor <> c.relowner
		UNION ALL
		SELECT 'security label', 'pg_catalog.pg_class'::regclass, t.oid, t.attnum, pg_catalog.format('provider %I has labelled it', l.provider)
		FROM target t JOIN pg_catalog.pg_seclabel l ON l.classoid = 'pg_catalog.pg_class'::regclass
			AND l.objoid = t.oid AND l.objsubid = t.attnum
		UNION ALL
		-- what the caller could not make again
		SELECT 'owner', 'pg_catalog.pg_class'::regclass, c.oid, 0, pg_catalog.format('role %I cannot act as its owner %I', current_user, r.rolname)
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_roles r ON r.oid = c.relowner
		WHERE c.oid IN (SELECT u.relation FROM in_use u)
			AND NOT (pg_catalog.pg_has_role(r.oid, 'USAGE') AND pg_catalog.pg_has_role(r.oid,
				CASE WHEN pg_catalog.current_setting('server_version_num')::integer < 160000 THEN 'MEMBER' ELSE 'SET' END))
		UNION ALL
		SELECT 'privilege', 'pg_catalog.pg_class'::regclass, v.oid, 0,
			pg_catalog.format('role %I may not create objects in schema %I', r.rolname, n.nspname)
		FROM view v JOIN pg_catalog.pg_namespace n ON n.oid = v.relnamespace
		JOIN pg_catalog.pg_roles r ON r.oid = v.relowner OR r.rolname = current_user
		WHERE v.relpersistence <> 't' AND NOT pg_catalog.has_schema_privilege(r.oid, n.oid, 'CREATE')
			AND NOT (SELECT m.rolsuper FROM pg_catalog.pg_roles m WHERE m.rolname = current_user)
		UNION ALL
		SELECT 'privilege', 'pg_catalog.pg_trigger'::regclass, g.oid, 0,
			pg_catalog.format('role %I may not execute its function, or has no privilege TRIGGER', current_user)
		FROM pg_catalog.pg_trigger g
		WHERE (g.oid IN (SELECT u.objid FROM used u WHERE u.classid = 'pg_catalog.pg_trigger'::regclass)
				OR NOT g.tgisinternal AND g.tgrelid IN (SELECT v.oid FROM view v))
			AND NOT (pg_catalog.has_function_privilege(g.tgfoid, 'EXECUTE') AND pg_catalog.has_table_privilege(g.tgrelid, 'TRIGGER'))
		UNION ALL
		SELECT DISTINCT 'passed on privileges', 'pg_catalog.pg_class'::regclass::oid, v.oid, 0,
			pg_catalog.format('role %s, not its owner, has granted some', a.grantor::regrole)
		FROM view v CROSS JOIN LATERAL (
			SELECT e.grantor FROM pg_catalog.aclexplode(v.relacl) e
			UNION ALL
			SELECT e.grantor FROM pg_catalog.pg_attribute t, pg_catalog.aclexplode(t.attacl) e WHERE t.attrelid = v.oid
			UNION ALL
			SELECT e.grantor FROM pg_catalog.pg_type y, pg_catalog.aclexplode(y.typacl) e WHERE y.oid = v.reltype) a
		WHERE a.grantor <> v.relowner
		UNION ALL
		SELECT 'extension', d.classid, d.objid, 0, pg_catalog.format('it belongs to extension %I', e.extname)
		FROM used u JOIN pg_catalog.pg_depend d ON d.classid = u.classid AND d.objid = u.objid
			AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'
		JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
		UNION ALL
		-- whatever else knows the column or a view by number
		SELECT 'other object', d.classid, d.objid, d.objsubid, 'it refers to the column'
		FROM target t JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_class'::regclass
			AND d.refobjid = t.oid AND d.refobjsubid = t.attnum
		LEFT JOIN pg_catalog.pg_class c ON d.classid = 'pg_catalog.pg_class'::regclass AND c.oid = d.objid
		LEFT JOIN pg_catalog.pg_attrdef a ON d.classid = 'pg_catalog.pg_attrdef'::regclass AND a.oid = d.objid
		WHERE (c.relkind IN ('i', 'I', 'S') OR c.oid = t.oid OR a.adrelid = t.oid) IS NOT TRUE
			AND d.classid NOT IN ('pg_catalog.pg_rewrite'::regclass, 'pg_catalog.pg_trigger'::regclass,
				'pg_catalog.pg_policy'::regclass, 'pg_catalog.pg_constraint'::regclass, 'pg_catalog.pg_statistic_ext'::regclass,
				'pg_catalog.pg_proc'::regclass, 'pg_catalog.pg_publication_rel'::regclass)
		UNION ALL
		SELECT CASE WHEN c.relkind = 'S' THEN 'other object' ELSE 'row type' END, d.classid, d.objid, d.objsubid,
			pg_catalog.format('it refers to view %s, which has to be made anew', v.oid::regclass)
		FROM view v
		CROSS JOIN LATERAL (VALUES ('pg_catalog.pg_class'::regclass, v.oid),
			('pg_catalog.pg_type'::regclass, v.reltype), ('pg_catalog.pg_type'::regclass, v.typarray)) x (classid, objid)
		JOIN pg_catalog.pg_depend d ON d.refclassid = x.classid AND d.refobjid = x.objid
		LEFT JOIN pg_catalog.pg_class c ON d.classid = 'pg_catalog.pg_class'::regclass AND c.oid = d.objid
		LEFT JOIN pg_catalog.pg_attrdef a ON d.classid = 'pg_catalog.pg_attrdef'::regclass AND a.oid = d.objid
		WHERE d.classid NOT IN ('pg_catalog.pg_rewrite'::regclass, 'pg_catalog.pg_trigger'::regclass,
				'pg_catalog.pg_policy'::regclass, 'pg_catalog.pg_proc'::regclass)
			AND NOT (d.classid = 'pg_catalog.pg_type'::regclass AND d.objid IN (v.reltype, v.typarray))
			AND (c.oid IN (SELECT w.oid FROM view w) OR a.adrelid = v.oid OR c.relkind = 't') IS NOT TRUE
			-- of a materialized view
			AND NOT EXISTS (SELECT FROM pg_catalog.pg_index w WHERE w.indexrelid = c.oid AND w.indrelid = v.oid)
			AND NOT EXISTS (SELECT FROM pg_catalog.pg_statistic_ext w
				WHERE d.classid = 'pg_catalog.pg_statistic_ext'::regclass AND w.oid = d.objid AND w.stxrelid = v.oid)
	), listed AS (
		SELECT o.kind, i.identity AS name, o.reason
		FROM obstacle o, LATERAL pg_catalog.pg_identify_object(o.classid, o.objid, o.objsubid) i
		UNION
		SELECT x.kind, pg_catalog.quote_ident(p.pubname), x.reason
		FROM publication p CROSS JOIN LATERAL (VALUES
			('publication', p.prattrs IS NULL, 'it publishes all columns, and the subscriber does not have the new one'),
			('publication', p.relreplident IN ('f', 'n'), 'it publishes the table, whose replica identity is '
				|| CASE p.relreplident WHEN 'f' THEN 'FULL' ELSE 'NOTHING' END)) x (kind, applies, reason)
		WHERE x.applies
		UNION
		SELECT p.kind, pg_catalog.quote_ident(p.publication), CASE p.kind WHEN 'publication row filter' THEN 'its condition uses the column'
			ELSE 'its list of columns has the column' END
			|| pg_catalog.format(', and role %I is not an owner of it', current_user)
		FROM risky_migrations.column_publications(column_obstacles.relid, ARRAY[column_obstacles.attnum]) p
		WHERE NOT pg_catalog.pg_has_role(p.owner, 'USAGE')
	)
	SELECT l.kind, l.name, l.reason, h.hint
	FROM listed l LEFT JOIN (VALUES
		('materialized view', 'Drop it, and create it again after the migration; or, with the method three_step, SET risky_migrations.recreate_matviews = on: it is filled again beside its readers.'),
		('temporary view', 'Drop it, or end the session that made it.'),
		('circular view', 'Drop it; nobody can read it.'),
		('function', 'Drop it, and create it again after the migration; or give it a body that is a string.'),
		('column alias list', 'Rename columns in the select list, not in FROM.'),
		('row constructor', 'Write it without the row type of the table.'),
		('generated column', 'Drop it, and add it again after the migration.'),
		('typed table', 'Make it an ordinary table with ALTER TABLE ... NOT OF.'),
		('partition', 'Name the partitioned table that it belongs to.'),
		('partition key', 'Copy the rows into a table that is partitioned by the new type.'),
		('inherited column', 'Name the table that the column is inherited from.'),
		('child table', 'Take it away from its parent with ALTER TABLE ... NO INHERIT, or make it like the others.'),
		('row type', 'Drop it, or give it a type of its own.'),
		('exclusion constraint', 'Drop it, and add it again after the migration.'),
		('deferrable constraint', 'Drop it, and add it again after the migration.'),
		('foreign key', 'Drop it, and add it again after the migration; or run it as a role that owns both tables.'),
		('security label', 'Remove the label, and set it again after the migration.'),
		('owner', 'Run the migration as a role that is a member of the owner''s, with its privileges.'),
		('privilege', 'Grant it, or run the migration as a superuser.'),
		('passed on privileges', 'Revoke them, and let the owner grant them.'),
		('extension', 'Take it out of the extension, or drop the extension.'),
		('publication', 'Take the table out of the publication; or, where the subscribers have the new column already, SET risky_migrations.accept_publications = on.'),
		('publication column list', 'Run the migration as a role that owns the publication too; or take the column out of the list, and put it back after the migration.'),
		('publication row filter', 'Run the migration as a role that owns the publication too; or take the condition off, and set it again after the migration.'),
		('other object', 'Drop it, and create it again after the migration.')) h (kind, hint) ON h.kind = l.kind
	ORDER BY l.kind COLLATE "C", l.name COLLATE "C", l.reason COLLATE "C";
END;
COMMENT ON FUNCTION risky_migrations.column_obstacles(oid, smallint) IS
	'everything that forbids to exchange a column for the caller, all of it, with the reason and what to do; the kind publication may be accepted';

CREATE FUNCTION risky_migrations.column_coercions(relid oid, attnum smallint, new_type oid)
RETURNS TABLE (kind text, name text, reason text, hint text)
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	-- PostgreSQL writes out the casts that it has put in by itself, and so they
	-- stay when a definition is made again, where the new type needs none, or
	-- one that fails.  Casts of the user's own are his to decide.
	WITH RECURSIVE base (oid) AS (
		SELECT column_coercions.new_type
		UNION
		SELECT y.typbasetype FROM base b JOIN pg_catalog.pg_type y ON y.oid = b.oid WHERE y.typtype = 'd'
	), new AS (
		SELECT y.oid, y.typcategory FROM base b JOIN pg_catalog.pg_type y ON y.oid = b.oid WHERE y.typtype <> 'd'
	), target AS (
		SELECT m.number, a.atttypid, y.typtype = 'd' AS is_domain
		FROM risky_migrations.member_columns(column_coercions.relid, ARRAY[column_coercions.attnum]) m
		JOIN pg_catalog.pg_attribute a ON a.attrelid = m.member AND a.attnum = m.number
		JOIN pg_catalog.pg_type y ON y.oid = a.atttypid
	), used AS MATERIALIZED (
		SELECT u.classid, u.objid, u.depth
		FROM risky_migrations.column_dependents(column_coercions.relid, ARRAY[column_coercions.attnum]) u
	), definition AS (
		SELECT u.classid, u.objid, u.depth, w.ev_action::text AS tree
		FROM used u JOIN pg_catalog.pg_rewrite w ON w.ev_class = u.objid AND w.ev_type = '1'
		WHERE u.classid = 'pg_catalog.pg_class'::regclass AND u.depth > 0
		UNION ALL
		SELECT u.classid, u.objid, 0, pg_catalog.concat(w.ev_action::text, w.ev_qual::text)
		FROM used u JOIN pg_catalog.pg_rewrite w ON u.classid = 'pg_catalog.pg_rewrite'::regclass AND w.oid = u.objid
		UNION ALL
		SELECT u.classid, u.objid, 0, pg_catalog.concat(p.polqual::text, p.polwithcheck::text)
		FROM used u JOIN pg_catalog.pg_policy p ON u.classid = 'pg_catalog.pg_policy'::regclass AND p.oid = u.objid
		UNION ALL
		SELECT u.classid, u.objid, 0, g.tgqual::text
		FROM used u JOIN pg_catalog.pg_trigger g ON u.classid = 'pg_catalog.pg_trigger'::regclass AND g.oid = u.objid
		UNION ALL
		SELECT 'pg_catalog.pg_publication_rel'::regclass, r.oid, 0, r.prqual::text
		FROM risky_migrations.column_publications(column_coercions.relid, ARRAY[column_coercions.attnum]) p
		JOIN pg_catalog.pg_publication_rel r ON r.oid = p.objid
	), coerced AS (
		SELECT DISTINCT d.classid, d.objid, coalesce(x.match[1], x.match[2])::oid AS type
		FROM definition d CROSS JOIN target t
		CROSS JOIN LATERAL pg_catalog.regexp_matches(d.tree, pg_catalog.format(
			-- implicit ones of the column: a function, or the same value by another name
			'\{(?:FUNCEXPR :funcid \d+ :funcresulttype (\d+) :funcretset false :funcvariadic false :funcformat 2 :funccollid \d+ :inputcollid \d+ :args \(|RELABELTYPE :arg )'
				'\{VAR :varno \d+ :varattno %s :vartype %s [^{}]*\}(?: :resulttype (\d+) :resulttypmod -?\d+ :resultcollid \d+ :relabelformat 2 )?',
			-- a view that stands on another one has a number of its own for it
			CASE WHEN d.depth > 1 AND t.is_domain THEN '\d+' ELSE t.number::text END, t.atttypid), 'g') x (match)
	)
	SELECT 'implicit cast', i.identity,
		pg_catalog.format('it has the column cast to %s, and values of type %s need not fit', pg_catalog.format_type(c.type, NULL),
			pg_catalog.format_type(column_coercions.new_type, NULL)),
		'Write a cast to the new type into it (column::newtype), or drop it, and create it again after the migration.'
	FROM coerced c CROSS JOIN new n JOIN pg_catalog.pg_type y ON y.oid = c.type
	CROSS JOIN LATERAL pg_catalog.pg_identify_object(c.classid, c.objid, 0) i
	WHERE n.typcategory = 'N' AND y.typcategory = 'N' AND EXISTS (SELECT FROM pg_catalog.pg_cast k
			WHERE k.castsource = n.oid AND k.casttarget = y.oid AND k.castcontext <> 'i' AND k.castmethod = 'f')
		OR n.typcategory = 'S' AND y.typcategory <> 'S'
	ORDER BY 2, 3;
END;
COMMENT ON FUNCTION risky_migrations.column_coercions(oid, smallint, oid) IS
	'what reads a column through a cast that nobody wrote and that would be written out, and could fail for values of the new type; as column_obstacles()';

CREATE FUNCTION risky_migrations.rewrite_obstacles(relid oid, attnums smallint[], new_types oid[])
RETURNS TABLE (kind text, name text, reason text, hint text)
LANGUAGE sql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH change (attnum, new_type) AS (
		SELECT c.attnum, c.new_type FROM unnest(rewrite_obstacles.attnums, rewrite_obstacles.new_types) c (attnum, new_type)
	), found (part, kind, name, reason, hint) AS (
		SELECT 1, o.kind, o.name, o.reason, o.hint
		FROM change c, risky_migrations.column_obstacles(rewrite_obstacles.relid, c.attnum) o
		-- the column keeps its place, its number and its constraints
		WHERE o.kind NOT IN ('exclusion constraint', 'deferrable constraint', 'publication', 'security label',
			'column alias list', 'row constructor')
		UNION
		SELECT 2, 'foreign key', (pg_identify_object('pg_constraint'::regclass, k.oid, 0)).identity,
			'it is one of a partitioned table, which cannot have it without proving all rows under its lock',
			'Use the method three_step, or drop it and add it again afterwards.'
		FROM risky_migrations.member_columns(rewrite_obstacles.relid, rewrite_obstacles.attnums) m
		JOIN pg_constraint k ON k.contype = 'f' AND k.conparentid = 0
			AND (k.conrelid = m.member AND m.number = ANY (k.conkey) OR k.confrelid = m.member AND m.number = ANY (k.confkey))
		JOIN pg_class c ON c.oid = k.conrelid AND c.relkind = 'p'
		UNION
		SELECT 2, 'index', (pg_identify_object('pg_class'::regclass, i.indexrelid, 0)).identity,
			'not all partitions have their part of it, and ALTER TABLE would make what is missing',
			'Attach what it lacks, or drop it.'
		FROM risky_migrations.member_columns(rewrite_obstacles.relid, rewrite_obstacles.attnums) m
		JOIN pg_index i ON i.indrelid = m.member AND NOT i.indisvalid
		JOIN pg_class c ON c.oid = i.indexrelid AND c.relkind = 'I'
		WHERE m.number = ANY (i.indkey)
			OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
				AND d.refclassid = 'pg_class'::regclass AND d.refobjid = m.member AND d.refobjsubid = m.number)
		UNION
		SELECT 3, o.kind, o.name, o.reason, o.hint
		FROM change c, risky_migrations.column_coercions(rewrite_obstacles.relid, c.attnum, c.new_type) o
	)
	SELECT f.kind, f.name, f.reason, f.hint FROM found f
	ORDER BY f.part, f.kind COLLATE "C", f.name COLLATE "C", f.reason COLLATE "C";
END;
COMMENT ON FUNCTION risky_migrations.rewrite_obstacles(oid, smallint[], oid[]) IS
	'what keeps online_rewrite from giving columns these types, with the reason and what to do';

-- Definitions come from a twin: an empty copy of the table in which the ALTER
-- has been done by PostgreSQL itself and whose column bears the name that the
-- new one has while it waits.  Only the names of table and index in front of
-- them are ours to replace.
-- ALTER TABLE makes indexes and statistics anew, with other OIDs but the same
-- names; so each of the twin's is first named after its original.
CREATE FUNCTION risky_migrations.name_twins(relid oid, twin oid, prefix text)
RETURNS TABLE (command text) LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	-- LIKE copies them in the order of their OIDs
	WITH idx AS (
		SELECT x.indrelid, x.indexrelid, x.indisunique, x.indnatts, x.indnkeyatts, c.relname, n.nspname,
			row_number() OVER (PARTITION BY x.indrelid ORDER BY x.indexrelid) AS nth
		FROM pg_index x
		JOIN pg_class c ON c.oid = x.indexrelid
		JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE x.indrelid IN (name_twins.relid, name_twins.twin) AND x.indislive
	), sta AS (
		SELECT e.stxrelid, e.oid, e.stxname, n.nspname, cardinality(e.stxkeys::int2[]) AS nkeys,
			row_number() OVER (PARTITION BY e.stxrelid ORDER BY e.oid) AS nth
		FROM pg_statistic_ext e JOIN pg_namespace n ON n.oid = e.stxnamespace
		WHERE e.stxrelid IN (name_twins.relid, name_twins.twin)
	), seq AS (
		SELECT d.refobjid, a.attname, s.seqtypid, c.relname, n.nspname
		FROM pg_depend d
		JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
		JOIN pg_sequence s ON s.seqrelid = d.objid
		JOIN pg_class c ON c.oid = s.seqrelid
		JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'i'
			AND a.attidentity <> '' AND d.refobjid IN (name_twins.relid, name_twins.twin)
	)
	SELECT format('ALTER INDEX %I.%I RENAME TO %I', t.nspname, t.relname, name_twins.prefix || o.indexrelid)
	FROM idx o JOIN idx t ON t.nth = o.nth AND t.indisunique = o.indisunique
		AND t.indnatts = o.indnatts AND t.indnkeyatts = o.indnkeyatts
	WHERE o.indrelid = name_twins.relid AND t.indrelid = name_twins.twin
	UNION ALL
	SELECT format('ALTER STATISTICS %I.%I RENAME TO %I', t.nspname, t.stxname, name_twins.prefix || o.oid)
	FROM sta o JOIN sta t ON t.nth = o.nth AND t.nkeys = o.nkeys
	WHERE o.stxrelid = name_twins.relid AND t.stxrelid = name_twins.twin
	UNION ALL
	-- LIKE makes each a bigint, within the bounds of the original
	SELECT format('ALTER SEQUENCE %I.%I AS %s', t.nspname, t.relname, format_type(o.seqtypid, NULL))
	FROM seq o JOIN seq t ON t.attname = o.attname AND t.seqtypid <> o.seqtypid
	WHERE o.refobjid = name_twins.relid AND t.refobjid = name_twins.twin;
END;
COMMENT ON FUNCTION risky_migrations.name_twins(oid, oid, text) IS
	'commands that name each index and statistics object of a twin after the original''s OID, and give identity sequences their type';

CREATE FUNCTION risky_migrations.dependents(relid oid, attnum smallint, shadow smallint,
	twin oid, twin_attnum smallint, build_column text, final_column text, prefix text,
	OUT ord bigint, OUT kind text, OUT name text, OUT relation oid, OUT peer oid,
	OUT build_name text, OUT build_sql text, OUT by_worker boolean,
	OUT validate_sql text, OUT make_sql text, OUT take_sql text[], OUT drop_sql text)
RETURNS SETOF record LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH rel AS (
		SELECT c.oid, n.nspname, format('%I.%I', n.nspname, c.relname) AS sql
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
	), me AS (
		SELECT r.*, c.relkind = 'p' AS parted, c.relispartition AS part,
			-- has it parents or children?
			NOT c.relispartition AND c.relkind <> 'p' AND EXISTS (SELECT FROM pg_inherits h
				WHERE h.inhparent = c.oid OR h.inhrelid = c.oid) AS related,
			-- ALTER TABLE of a partitioned table is for all that is below it
			format('ALTER TABLE %s%s', CASE c.relkind WHEN 'p' THEN '' ELSE 'ONLY ' END, r.sql) AS alter
		FROM rel r JOIN pg_class c ON c.oid = r.oid WHERE r.oid = dependents.relid
	), idx AS (
		SELECT x.*, i.relname, i.reltablespace, i.reloptions
		FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
		WHERE x.indrelid IN (dependents.relid, dependents.twin) AND x.indislive
	), twin_idx AS (
		SELECT t.relname,
			substr(pg_get_indexdef(t.indexrelid), 1 + length(format('CREATE %sINDEX %I ON %s USING ',
				CASE WHEN t.indisunique THEN 'UNIQUE ' ELSE '' END, t.relname, r.sql))) AS def,
			coalesce(' WHERE ' || pg_get_expr(t.indpred, t.indrelid), '') AS pred,
			(SELECT pg_get_constraintdef(k.oid) FROM pg_constraint k
				WHERE k.conindid = t.indexrelid AND k.conrelid = t.indrelid AND k.contype IN ('p', 'u')) AS condef
		FROM idx t JOIN rel r ON r.oid = t.indrelid
		WHERE t.indrelid = dependents.twin
	), used AS (
		SELECT o.*, k.conname, k.contype, k.condeferrable, k.condeferred, k.oid AS conoid,
			left(t.def, length(t.def) - length(t.pred))
				|| coalesce(' TABLESPACE ' || quote_ident(s.spcname), '') || t.pred AS def,
			t.condef || coalesce(' WITH (' || (SELECT string_agg(format('%I = %L', x.option_name, x.option_value), ', ')
					FROM pg_options_to_table(o.reloptions) x) || ')', '')
				|| coalesce(' USING INDEX TABLESPACE ' || quote_ident(s.spcname), '') AS condef,
			dependents.prefix || o.indexrelid AS build_name,
			n.nspname, a.sql AS parent
		FROM idx o
		-- of the partitioned table, to which it is attached
		LEFT JOIN pg_inherits h ON h.inhrelid = o.indexrelid
		LEFT JOIN rel a ON a.oid = h.inhparent
		LEFT JOIN twin_idx t ON t.relname = overlay(dependents.prefix PLACING 'x' FROM 4 FOR 1) || o.indexrelid
		LEFT JOIN pg_tablespace s ON s.oid = o.reltablespace
		LEFT JOIN pg_constraint k ON k.conindid = o.indexrelid AND k.conrelid = dependents.relid
			AND k.contype IN ('p', 'u', 'x')
		CROSS JOIN me n
		WHERE o.indrelid = dependents.relid
			AND (dependents.attnum = ANY (o.indkey) OR EXISTS (SELECT FROM pg_depend d
				WHERE d.classid = 'pg_class'::regclass AND d.objid = o.indexrelid
					AND d.refclassid = 'pg_class'::regclass AND d.refobjid = dependents.relid
					AND d.refobjsubid = dependents.attnum))
	), everything (rank, sub, kind, name, relation, peer, build_name, build_sql, by_worker,
			validate_sql, make_sql, take_sql, drop_sql) AS (
		-- what the column itself has
		SELECT 1, 0, 'column', a.attname::text, me.oid, NULL::oid, NULL, NULL, false, NULL, NULL,
			array_remove(ARRAY[
				CASE WHEN a.attstattarget >= 0 THEN format('ALTER TABLE ONLY %s ALTER COLUMN %I SET STATISTICS %s',
					me.sql, dependents.final_column, a.attstattarget) END,
				CASE WHEN a.attoptions IS NOT NULL THEN format('ALTER TABLE ONLY %s ALTER COLUMN %I SET (%s)',
					me.sql, dependents.final_column,
					(SELECT string_agg(format('%I = %L', split_part(o, '=', 1), substr(o, strpos(o, '=') + 1)), ', ')
						FROM unnest(a.attoptions) o)) END,
				CASE WHEN col_description(me.oid, a.attnum) IS NOT NULL
					THEN format('COMMENT ON COLUMN %s.%I IS %L', me.sql, dependents.final_column,
						col_description(me.oid, a.attnum)) END,
				CASE WHEN a.attstorage <> y.typstorage AND w.typlen = -1 AND w.typstorage <> 'p'
					THEN format('ALTER TABLE ONLY %s ALTER COLUMN %I SET STORAGE %s', me.sql, dependents.final_column,
						CASE a.attstorage WHEN 'p' THEN 'PLAIN' WHEN 'm' THEN 'MAIN' WHEN 'e' THEN 'EXTERNAL' ELSE 'EXTENDED' END) END,
				CASE WHEN a.attcompression <> '' AND w.typlen = -1 AND w.typstorage <> 'p'
					THEN format('ALTER TABLE ONLY %s ALTER COLUMN %I SET COMPRESSION %s', me.sql, dependents.final_column,
						CASE a.attcompression WHEN 'p' THEN 'pglz' ELSE 'lz4' END) END
				]::text[] || (SELECT array_agg(format('GRANT %s (%I) ON %s TO %s%s', g.privilege_type,
						dependents.final_column, me.sql,
						CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END,
						CASE WHEN g.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
						ORDER BY g.grantee, g.privilege_type)
					FROM aclexplode(a.attacl) g), NULL), NULL
		FROM me JOIN pg_attribute a ON a.attrelid = me.oid AND a.attnum = dependents.attnum
		JOIN pg_type y ON y.oid = a.atttypid
		JOIN pg_attribute b ON b.attrelid = dependents.twin AND b.attnum = dependents.twin_attnum
		JOIN pg_type w ON w.oid = b.atttypid
		UNION ALL
		-- its default, and the sequence that it owns
		SELECT 2, 0, 'default', b.attname::text, me.oid, NULL, NULL, NULL, false, NULL, NULL,
			array_remove(ARRAY[format('ALTER TABLE ONLY %s ALTER COLUMN %I SET DEFAULT %s', me.sql,
				dependents.final_column, pg_get_expr(f.adbin, f.adrelid))], NULL),
			format('ALTER TABLE ONLY %s ALTER COLUMN %I DROP DEFAULT', me.sql, b.attname)
		FROM me
		JOIN pg_attribute b ON b.attrelid = me.oid AND b.attnum = dependents.attnum AND b.attgenerated = ''
		JOIN pg_attrdef f ON f.adrelid = dependents.twin AND f.adnum = dependents.twin_attnum
		UNION ALL
		SELECT 3, d.objid::bigint, CASE d.deptype WHEN 'i' THEN 'identity' ELSE 'sequence' END,
			s.sql, me.oid, d.objid, NULL, NULL, false, NULL, NULL,
			CASE d.deptype WHEN 'a' THEN ARRAY[format('ALTER SEQUENCE %s OWNED BY %s.%I', s.sql, me.sql, dependents.final_column)]
				ELSE '{}' END
			-- back to the type that it has now, forth to the column's
			|| CASE WHEN dependents.prefix LIKE 'rm!_o!_%' ESCAPE '!'
				THEN ARRAY[format('ALTER SEQUENCE %s AS %s', s.sql, format_type(q.seqtypid, NULL))]
				WHEN q.seqtypid <> w.oid AND w.oid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
				THEN ARRAY[format('ALTER SEQUENCE %s AS %s', s.sql, format_type(w.oid, NULL))] ELSE '{}' END,
			NULL
		FROM me
		JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = me.oid
			AND d.refobjsubid = dependents.attnum AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
		JOIN pg_sequence q ON q.seqrelid = d.objid
		JOIN rel s ON s.oid = d.objid
		JOIN pg_attribute b ON b.attrelid = dependents.twin AND b.attnum = dependents.twin_attnum
		JOIN pg_type w ON w.oid = b.atttypid
		UNION ALL
		-- indexes, and the constraints that are made of them; a partitioned
		-- table's are made empty, and those of the partitions attached
		SELECT 4, u.indexrelid::bigint, CASE u.contype WHEN 'p' THEN 'primary key' WHEN 'u' THEN 'unique constraint'
				WHEN 'x' THEN 'exclusion constraint' ELSE 'index' END,
			u.relname::text, me.oid, NULL,
			CASE WHEN NOT me.parted THEN u.build_name END,
			CASE WHEN NOT me.parted THEN format('CREATE %sINDEX CONCURRENTLY %I ON %s USING %s',
				CASE WHEN u.indisunique THEN 'UNIQUE ' ELSE '' END, u.build_name, me.sql, u.def) END,
			NOT me.parted, NULL,
			CASE WHEN NOT me.parted THEN NULL
				WHEN u.contype IS NULL THEN format('CREATE %sINDEX %I ON ONLY %s USING %s',
					CASE WHEN u.indisunique THEN 'UNIQUE ' ELSE '' END, u.relname, me.sql, u.def)
				ELSE format('ALTER TABLE ONLY %s ADD CONSTRAINT %I %s', me.sql, u.conname, u.condef) END,
			array_remove(ARRAY[
				CASE WHEN me.parted THEN NULL WHEN u.contype IS NULL
					THEN format('ALTER INDEX %I.%I RENAME TO %I', me.nspname, u.build_name, u.relname)
					ELSE format('ALTER TABLE ONLY %s ADD CONSTRAINT %I %s USING INDEX %I', me.sql, u.conname,
						CASE u.contype WHEN 'p' THEN 'PRIMARY KEY' ELSE 'UNIQUE' END, u.build_name) END,
				CASE WHEN u.indisclustered THEN format('ALTER TABLE ONLY %s CLUSTER ON %I', me.sql, u.relname) END,
				CASE WHEN u.indisreplident AND NOT me.parted
					THEN format('ALTER TABLE ONLY %s REPLICA IDENTITY USING INDEX %I', me.sql, u.relname) END,
				CASE WHEN obj_description(u.indexrelid, 'pg_class') IS NOT NULL
					THEN format('COMMENT ON INDEX %I.%I IS %L', me.nspname, u.relname, obj_description(u.indexrelid, 'pg_class')) END,
				CASE WHEN obj_description(u.conoid, 'pg_constraint') IS NOT NULL
					THEN format('COMMENT ON CONSTRAINT %I ON %s IS %L', u.conname, me.sql, obj_description(u.conoid, 'pg_constraint')) END
				]::text[] || (SELECT array_agg(format('ALTER INDEX %I.%I ALTER COLUMN %s SET STATISTICS %s',
						me.nspname, u.relname, a.attnum, a.attstattarget) ORDER BY a.attnum)
					FROM pg_attribute a WHERE a.attrelid = u.indexrelid AND a.attstattarget >= 0)
				|| CASE WHEN u.parent IS NOT NULL
					THEN format('ALTER INDEX %s ATTACH PARTITION %I.%I', u.parent, me.nspname, u.relname) END, NULL),
			CASE WHEN u.parent IS NOT NULL THEN NULL	-- it goes with the parent's
				WHEN u.contype IS NOT NULL THEN format('%s DROP CONSTRAINT IF EXISTS %I', me.alter, u.conname)
				WHEN u.indisunique OR me.parted THEN format('DROP INDEX IF EXISTS %I.%I', me.nspname, u.relname)
				ELSE format('ALTER INDEX IF EXISTS %I.%I RENAME TO %I', me.nspname, u.relname,
					'rm_' || CASE WHEN dependents.prefix LIKE 'rm!_n!_%' ESCAPE '!' THEN 'o' ELSE 'n' END
					|| substr(u.build_name, 5)) END
		FROM used u CROSS JOIN me
		UNION ALL
		-- an index of a partitioned table is valid when all are attached
		SELECT 5, 0, 'replica identity', u.relname::text, me.oid, NULL, NULL, NULL, false, NULL, NULL,
			ARRAY[format('ALTER TABLE ONLY %s REPLICA IDENTITY USING INDEX %I', me.sql, u.relname)], NULL
		FROM used u CROSS JOIN me WHERE u.indisreplident AND me.parted
		UNION ALL
		-- CHECK constraints: validated before they are needed.  A partition or
		-- child has its parent's: it is added, renamed and dropped there, but
		-- proven here.  A child may have defined it too: then it is made here first,
		-- for the parent's to be merged into, and stays when the parent's goes.  The
		-- parent comes last of all, so what it gives to its children is named by then
		SELECT 5, k.oid::bigint, 'check constraint', k.conname::text, me.oid, NULL, dependents.prefix || i.top,
			CASE WHEN me.related AND i.top <> k.oid AND NOT k.conislocal THEN ''
				ELSE format('ALTER TABLE %s ADD CONSTRAINT %I %s%s', me.sql, dependents.prefix || i.top, t.def,
					CASE WHEN t.def ~ ' NOT (VALID|ENFORCED)$' THEN '' ELSE ' NOT VALID' END) END,
			false,
			CASE WHEN k.convalidated AND NOT me.parted
				THEN format('ALTER TABLE %s VALIDATE CONSTRAINT %I', me.sql, dependents.prefix || i.top) END,
			NULL,
			array_remove(ARRAY[
				CASE WHEN k.convalidated AND me.parted AND i.top = k.oid
					THEN format('ALTER TABLE %s VALIDATE CONSTRAINT %I', me.sql, dependents.prefix || i.top) END,
				CASE WHEN i.top = k.oid
					THEN format('ALTER TABLE %s RENAME CONSTRAINT %I TO %I', me.sql, dependents.prefix || i.top, k.conname) END,
				CASE WHEN obj_description(k.oid, 'pg_constraint') IS NOT NULL AND (i.top = k.oid OR NOT me.related)
					THEN format('COMMENT ON CONSTRAINT %I ON %s IS %L', k.conname, me.sql, obj_description(k.oid, 'pg_constraint')) END], NULL)
			|| CASE WHEN me.related AND i.top = k.oid AND NOT k.connoinherit
				THEN ARRAY(SELECT format('COMMENT ON CONSTRAINT %I ON %s IS %L', x.conname, r.sql, obj_description(x.oid, 'pg_constraint'))
					FROM risky_migrations.members(me.oid) h (oid) JOIN rel r ON r.oid = h.oid
					JOIN pg_constraint x ON x.conrelid = h.oid AND x.contype = 'c' AND x.conname = k.conname
					WHERE x.coninhcount > 0 AND obj_description(x.oid, 'pg_constraint') IS NOT NULL ORDER BY x.oid) END,
			CASE WHEN i.top = k.oid OR me.related AND k.conislocal
				THEN format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I', me.sql, k.conname) END
		FROM me
		JOIN pg_constraint k ON k.conrelid = me.oid AND k.contype = 'c' AND dependents.attnum = ANY (k.conkey)
		CROSS JOIN LATERAL (SELECT coalesce((SELECT x.oid FROM risky_migrations.ancestors(me.oid) a (relid)
			JOIN pg_constraint x ON x.conrelid = a.relid AND x.contype = 'c' AND x.conname = k.conname
				AND x.coninhcount = 0 AND NOT x.connoinherit
			WHERE k.coninhcount > 0 LIMIT 1), k.oid) AS top) i
		LEFT JOIN LATERAL (SELECT pg_get_constraintdef(x.oid) AS def FROM pg_constraint x
			WHERE x.conrelid = dependents.twin AND x.contype = 'c' AND x.conname = k.conname) t ON true
		WHERE k.conname !~ '^rm_(not_null|[no])_[0-9]+'
		UNION ALL
		-- foreign keys, of this table and of others that refer to it.  One of a
		-- partitioned table cannot be NOT VALID: it is proven in the partitions,
		-- and added when the columns have their names, which scans nothing.  One
		-- that refers to a partitioned table needs its index, which is not there
		-- before: it is tried by a query, which gives a row if there is one that
		-- has no peer, added NOT VALID, and proven after the exchange
		SELECT CASE WHEN k.conrelid = me.oid THEN 6 ELSE 7 END, k.oid::bigint, 'foreign key', k.conname::text,
			k.conrelid, k.confrelid, CASE WHEN NOT y.late THEN dependents.prefix || k.oid END,
			CASE WHEN NOT y.late THEN format('ALTER TABLE ONLY %s ADD CONSTRAINT %I %s NOT VALID',
					c.sql, dependents.prefix || k.oid, y.def)
				WHEN y.afterwards AND k.convalidated
				THEN format('SELECT FROM ONLY %s c LEFT JOIN %s p ON %s WHERE %s AND p.tableoid IS NULL LIMIT 1', c.sql, f.sql,
					(SELECT string_agg(format('p.%I OPERATOR(%I.%s) c.%I',
							CASE WHEN u.fn = dependents.attnum THEN dependents.build_column ELSE b.attname END,
							CASE WHEN u.fn = dependents.attnum THEN 'pg_catalog' ELSE n.nspname END,
							CASE WHEN u.fn = dependents.attnum THEN '=' ELSE o.oprname END, a.attname), ' AND ' ORDER BY u.i)
						FROM unnest(k.conkey, k.confkey, k.conpfeqop) WITH ORDINALITY u (n, fn, op, i)
						JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.n
						JOIN pg_attribute b ON b.attrelid = k.confrelid AND b.attnum = u.fn
						JOIN pg_operator o ON o.oid = u.op JOIN pg_namespace n ON n.oid = o.oprnamespace),
					(SELECT string_agg(format('c.%I IS NOT NULL', a.attname),
							CASE k.confmatchtype WHEN 'f' THEN ' OR ' ELSE ' AND ' END)
						FROM pg_attribute a WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey))) END,
			false,
			CASE WHEN k.convalidated AND (y.afterwards OR NOT y.late)
				THEN format('ALTER TABLE ONLY %s VALIDATE CONSTRAINT %I', c.sql,
					CASE WHEN y.late THEN k.conname ELSE dependents.prefix || k.oid END) END,
			NULL,
			array_remove(ARRAY[
				CASE WHEN y.late THEN format('ALTER TABLE %s ADD CONSTRAINT %I %s%s', c.sql, k.conname, y.def,
						CASE WHEN k.convalidated AND NOT y.afterwards THEN '' ELSE ' NOT VALID' END)
					ELSE format('ALTER TABLE ONLY %s RENAME CONSTRAINT %I TO %I', c.sql, dependents.prefix || k.oid, k.conname) END,
				CASE WHEN obj_description(k.oid, 'pg_constraint') IS NOT NULL
					THEN format('COMMENT ON CONSTRAINT %I ON %s IS %L', k.conname, c.sql, obj_description(k.oid, 'pg_constraint')) END], NULL),
			CASE WHEN k.conparentid = 0 THEN format('ALTER TABLE %s%s DROP CONSTRAINT IF EXISTS %I',
				CASE WHEN y.late AND NOT y.afterwards THEN '' ELSE 'ONLY ' END, c.sql, k.conname) END
		FROM me
		JOIN pg_constraint k ON k.contype = 'f'
			AND ((k.conrelid = me.oid AND dependents.attnum = ANY (k.conkey)
					-- the parent's, but not what stands for partitions of the other table
					AND NOT EXISTS (SELECT FROM pg_constraint x WHERE x.oid = k.conparentid AND x.conrelid = k.conrelid))
				OR (k.confrelid = me.oid AND dependents.attnum = ANY (k.confkey) AND k.conparentid = 0))
			AND k.conname !~ '^rm_[no]_[0-9]+_[0-9]+$'
		JOIN rel c ON c.oid = k.conrelid
		JOIN rel f ON f.oid = k.confrelid
		CROSS JOIN LATERAL (SELECT me.parted AND k.conrelid <> me.oid AS afterwards,
			CASE WHEN me.parted THEN dependents.final_column ELSE dependents.build_column END AS col) z
		CROSS JOIN LATERAL (SELECT me.parted AS late, z.afterwards,
			format('FOREIGN KEY (%s) REFERENCES %s (%s)%s%s%s%s',
				(SELECT string_agg(quote_ident(CASE WHEN k.conrelid = me.oid AND u.n = dependents.attnum
						THEN z.col ELSE a.attname END), ', ' ORDER BY u.i)
					FROM unnest(k.conkey) WITH ORDINALITY u (n, i)
					JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.n),
				f.sql,
				(SELECT string_agg(quote_ident(CASE WHEN k.confrelid = me.oid AND u.n = dependents.attnum
						THEN z.col ELSE a.attname END), ', ' ORDER BY u.i)
					FROM unnest(k.confkey) WITH ORDINALITY u (n, i)
					JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.n),
				CASE k.confmatchtype WHEN 'f' THEN ' MATCH FULL' ELSE '' END,
				coalesce(' ON UPDATE ' || CASE k.confupdtype WHEN 'r' THEN 'RESTRICT' WHEN 'c' THEN 'CASCADE'
					WHEN 'n' THEN 'SET NULL' WHEN 'd' THEN 'SET DEFAULT' END, ''),
				coalesce(' ON DELETE ' || CASE k.confdeltype WHEN 'r' THEN 'RESTRICT' WHEN 'c' THEN 'CASCADE'
					WHEN 'n' THEN 'SET NULL' WHEN 'd' THEN 'SET DEFAULT' END
					|| coalesce((SELECT ' (' || string_agg(quote_ident(CASE WHEN k.conrelid = me.oid AND u.n = dependents.attnum
							THEN z.col ELSE a.attname END), ', ' ORDER BY u.i) || ')'
						FROM unnest(k.confdelsetcols) WITH ORDINALITY u (n, i)
						JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.n), ''), ''),
				CASE WHEN k.condeferrable THEN ' DEFERRABLE' || CASE WHEN k.condeferred THEN ' INITIALLY DEFERRED' ELSE '' END ELSE '' END)
				AS def) y
		UNION ALL
		-- extended statistics
		SELECT 8, o.oid::bigint, 'statistics', format('%I.%I', o.nspname, o.stxname), me.oid, NULL, dependents.prefix || o.oid,
			format('CREATE STATISTICS %I.%I%s ON %s FROM %s', o.nspname, dependents.prefix || o.oid,
				CASE WHEN o.kinds IS NULL OR o.kinds = 'e' THEN '' ELSE ' (' || o.kinds || ')' END,
				pg_get_statisticsobjdef_columns(t.oid), me.sql),
			false, NULL, NULL,
			array_remove(ARRAY[format('ALTER STATISTICS %I.%I RENAME TO %I', o.nspname, dependents.prefix || o.oid, o.stxname),
				format('ALTER STATISTICS %I.%I OWNER TO %I', o.nspname, o.stxname, pg_get_userbyid(o.stxowner)),
				CASE WHEN o.stxstattarget >= 0 THEN format('ALTER STATISTICS %I.%I SET STATISTICS %s', o.nspname, o.stxname, o.stxstattarget) END,
				CASE WHEN obj_description(o.oid, 'pg_statistic_ext') IS NOT NULL
					THEN format('COMMENT ON STATISTICS %I.%I IS %L', o.nspname, o.stxname, obj_description(o.oid, 'pg_statistic_ext')) END], NULL),
			format('DROP STATISTICS IF EXISTS %I.%I', o.nspname, o.stxname)
		FROM me
		JOIN (SELECT e.*, n.nspname,
				(SELECT string_agg(CASE x WHEN 'd' THEN 'ndistinct' WHEN 'f' THEN 'dependencies' WHEN 'm' THEN 'mcv' END, ', ')
					FROM unnest(e.stxkind) x WHERE x <> 'e') AS kinds
			FROM pg_statistic_ext e JOIN pg_namespace n ON n.oid = e.stxnamespace
			WHERE e.stxrelid = dependents.relid AND e.stxname !~ '^rm_[no]_[0-9]+_[0-9]+$') o ON true
		LEFT JOIN pg_statistic_ext t ON t.stxrelid = dependents.twin
			AND t.stxname = overlay(dependents.prefix PLACING 'x' FROM 4 FOR 1) || o.oid
		WHERE dependents.attnum = ANY (o.stxkeys) OR EXISTS (SELECT FROM pg_depend d
			WHERE d.classid = 'pg_statistic_ext'::regclass AND d.objid = o.oid
				AND d.refclassid = 'pg_class'::regclass AND d.refobjid = me.oid
				AND d.refobjsubid = dependents.attnum)
		UNION ALL
		-- NOT NULL, which is a constraint with a name from 18 on 0: the
		-- first in force, the last to go); the shadow column has it already.
		-- In a partition it is proven only.  Of a table with parents or children it
		-- is proven for that one alone, so that who comes later is not held to it;
		-- then the parent's is set in all below it, and where a child has it of
		-- its own too it is told so
		SELECT 0, 0, 'not null', coalesce(k.conname, a.attname)::text, me.oid, NULL,
			CASE WHEN z.missing THEN z.proof END,
			CASE WHEN z.missing
				THEN format('%s ADD CONSTRAINT %I CHECK (%I IS NOT NULL)%s NOT VALID', me.alter,
					z.proof, dependents.build_column,
					CASE WHEN me.parted OR me.part THEN '' ELSE ' NO INHERIT' END) END,
			false,
			CASE WHEN z.missing AND NOT me.parted
				THEN format('ALTER TABLE ONLY %s VALIDATE CONSTRAINT %I', me.sql, z.proof) END,
			-- before the primary key of a partitioned table
			CASE WHEN z.missing AND me.parted AND NOT me.part
				THEN format('%s ALTER COLUMN %I SET NOT NULL', me.alter, dependents.build_column) END,
			CASE WHEN me.part THEN '{}'
				WHEN z.missing
				THEN array_remove(ARRAY[CASE WHEN me.parted THEN NULL WHEN k.conname IS NULL
						THEN format('ALTER TABLE ONLY %s ALTER COLUMN %I SET NOT NULL', me.sql, dependents.final_column)
						WHEN me.related AND NOT k.conislocal THEN NULL
						WHEN me.related AND NOT k.connoinherit
						THEN format('ALTER TABLE %s ALTER COLUMN %I SET NOT NULL', me.sql, dependents.final_column)
						ELSE format('ALTER TABLE %s%s ADD CONSTRAINT %I NOT NULL %I%s',
							CASE WHEN k.connoinherit THEN 'ONLY ' ELSE '' END, me.sql, k.conname, dependents.final_column,
							CASE WHEN k.connoinherit THEN ' NO INHERIT' ELSE '' END) END,
					format('%s DROP CONSTRAINT %I', me.alter, z.proof)], NULL)
				-- members may have other names: see rm_name_not_null()
				WHEN k.conname IS NOT NULL AND kb.conname IS NOT NULL AND NOT me.parted AND NOT me.related
				THEN ARRAY[format('%s RENAME CONSTRAINT %I TO %I', me.alter, kb.conname, k.conname)]
				ELSE '{}' END,
			format('ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL', me.sql, a.attname)
		FROM me
		JOIN pg_attribute a ON a.attrelid = me.oid AND a.attnum = dependents.attnum AND a.attnotnull
		LEFT JOIN pg_attribute b ON b.attrelid = me.oid AND b.attnum = dependents.shadow AND b.attnotnull
			AND dependents.prefix LIKE 'rm!_n!_%' ESCAPE '!'
		-- a child that has a constraint of the same name as its parent could not be taken
		-- away from it, whatever they have to do with each other
		CROSS JOIN LATERAL (SELECT b.attnotnull IS NULL AS missing, dependents.prefix || '0'
			|| CASE WHEN me.parted OR me.part THEN '' ELSE '_' || me.oid END AS proof) z
		LEFT JOIN pg_constraint k ON k.conrelid = me.oid AND k.contype = 'n' AND k.conkey = ARRAY[dependents.attnum]
		LEFT JOIN pg_constraint kb ON kb.conrelid = me.oid AND kb.contype = 'n' AND kb.conkey = ARRAY[dependents.shadow]
	)
	SELECT row_number() OVER (ORDER BY e.rank, e.sub), e.kind, e.name, e.relation, e.peer, e.build_name,
		e.build_sql, e.by_worker, e.validate_sql, e.make_sql, e.take_sql, e.drop_sql
	FROM everything e ORDER BY e.rank, e.sub;
END;
COMMENT ON FUNCTION risky_migrations.dependents(oid, smallint, smallint, oid, smallint, text, text, text) IS
	'everything of a table''s own that hangs on a column, with the commands that build it on another column, make it there in the exchange if it can only be made then, put it in force, and put the present one out of force';

CREATE FUNCTION risky_migrations.leftovers(relid oid, prefix text, wanted text[])
RETURNS TABLE (drop_sql text) LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH m AS MATERIALIZED (SELECT x.oid FROM risky_migrations.members(leftovers.relid) x (oid))
	-- constraints before the indexes that they may need
	SELECT f.sql FROM (
		SELECT 0, 0, y.ord::oid, y.drop_sql FROM risky_migrations.copies_there(leftovers.relid, leftovers.prefix) y
		UNION ALL
		SELECT 1, (SELECT count(*) FROM risky_migrations.ancestors(k.conrelid)), k.oid, format('ALTER TABLE %I.%I DROP CONSTRAINT %I', n.nspname, c.relname, k.conname)
		FROM pg_constraint k
		JOIN pg_class c ON c.oid = k.conrelid
		JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE (k.conrelid IN (SELECT m.oid FROM m) OR k.confrelid IN (SELECT m.oid FROM m)) AND k.contype IN ('c', 'f')
			-- the parent's goes from its partitions too, and from children that have
			-- not made it themselves; these follow
			AND k.conparentid = 0 AND (k.coninhcount = 0 OR k.conislocal AND NOT c.relispartition)
			AND starts_with(k.conname, leftovers.prefix) AND k.conname <> ALL (leftovers.wanted)
		UNION ALL
		SELECT 2, 0, x.oid, format('DROP STATISTICS %I.%I', n.nspname, x.stxname)
		FROM pg_statistic_ext x JOIN pg_namespace n ON n.oid = x.stxnamespace
		WHERE x.stxrelid IN (SELECT m.oid FROM m)
			AND starts_with(x.stxname, leftovers.prefix) AND x.stxname <> ALL (leftovers.wanted)
		UNION ALL
		SELECT 3, 0, c.oid, format('DROP INDEX %I.%I', n.nspname, c.relname)
		FROM pg_index i
		JOIN pg_class c ON c.oid = i.indexrelid
		JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE i.indrelid IN (SELECT m.oid FROM m)
			AND starts_with(c.relname, leftovers.prefix) AND c.relname <> ALL (leftovers.wanted)) f (rank, depth, oid, sql)
	ORDER BY f.rank, f.depth, f.oid;
END;
COMMENT ON FUNCTION risky_migrations.leftovers(oid, text, text[]) IS
	'commands that drop what was built for a migration and is not wanted';

-- Asked for each partition, so it may read no catalog from end to end: each is found
-- by an index, foreign keys that refer to the table by what they depend on.
CREATE FUNCTION risky_migrations.catalog_fingerprint(relid oid) RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
BEGIN ATOMIC
	WITH m AS MATERIALIZED (
		SELECT x.oid FROM risky_migrations.members(catalog_fingerprint.relid) x (oid)
	), i AS MATERIALIZED (
		SELECT x.indexrelid AS oid, x.xmin FROM pg_index x WHERE x.indrelid IN (SELECT m.oid FROM m)
	), k AS MATERIALIZED (
		SELECT k.oid, k.xmin, k.contype, k.conrelid, k.confrelid
		FROM (SELECT c.oid FROM m JOIN pg_constraint c ON c.conrelid = m.oid
			UNION SELECT d.objid FROM m JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = m.oid
			-- so said that no index on classid is used, which would find all constraints
			WHERE d.classid IS NOT DISTINCT FROM 'pg_constraint'::regclass) x (oid)
		JOIN pg_constraint k ON k.oid = x.oid
		WHERE k.conrelid IN (SELECT m.oid FROM m) OR k.confrelid IN (SELECT m.oid FROM m)
	), s AS MATERIALIZED (
		SELECT s.oid, s.xmin FROM pg_statistic_ext s WHERE s.stxrelid IN (SELECT m.oid FROM m)
	)
	SELECT md5(coalesce(string_agg(f.line, ',' ORDER BY f.line), '')) FROM (
		SELECT format('i%s/%s', i.oid, i.xmin) FROM i
		UNION ALL SELECT format('k%s/%s', k.oid, k.xmin) FROM k
		UNION ALL SELECT format('d%s/%s', d.oid, d.xmin) FROM pg_attrdef d WHERE d.adrelid IN (SELECT m.oid FROM m)
		UNION ALL SELECT format('s%s/%s', s.oid, s.xmin) FROM s
		UNION ALL SELECT format('a%s.%s/%s', a.attrelid, a.attnum, a.xmin) FROM pg_attribute a WHERE a.attrelid IN (SELECT m.oid FROM m)
		UNION ALL SELECT format('t%s/%s', t.oid, t.xmin) FROM pg_trigger t WHERE t.tgrelid IN (SELECT m.oid FROM m)
		-- what belongs to what
		UNION ALL SELECT format('h%s/%s', h.inhrelid, h.inhparent)
		FROM (SELECT m.oid FROM m UNION SELECT i.oid FROM i) x JOIN pg_inherits h ON h.inhrelid = x.oid
		-- names and options; a rename leaves pg_index as it is
		UNION ALL SELECT format('c%s %I.%I %s %s', c.oid, n.nspname, c.relname, c.reltablespace, c.reloptions)
		FROM (SELECT m.oid FROM m UNION SELECT i.oid FROM i
			UNION SELECT unnest(ARRAY[k.conrelid, k.confrelid]) FROM k WHERE k.contype = 'f') x
		JOIN pg_class c ON c.oid = x.oid JOIN pg_namespace n ON n.oid = c.relnamespace
		UNION ALL SELECT format('o%s/%s/%s/%s', d.objid, d.refobjsubid, d.deptype, q.xmin)
		FROM pg_depend d JOIN pg_sequence q ON q.seqrelid = d.objid
		WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
			AND d.refobjid IN (SELECT m.oid FROM m) AND d.refobjsubid > 0
		UNION ALL SELECT format('e%s/%s/%s/%s', e.classoid, e.objoid, e.objsubid, e.xmin)
		FROM (SELECT m.oid, 'pg_class'::regclass FROM m UNION SELECT i.oid, 'pg_class'::regclass FROM i
			UNION SELECT k.oid, 'pg_constraint'::regclass FROM k
			UNION SELECT s.oid, 'pg_statistic_ext'::regclass FROM s) x (oid, class)
		JOIN pg_description e ON e.objoid = x.oid AND e.classoid = x.class) f (line);
END;
COMMENT ON FUNCTION risky_migrations.catalog_fingerprint(oid) IS
	'changes with every change of the table''s columns, indexes, constraints, defaults, statistics and triggers, their names, options and comments, and of its partitions'' or children''s';

-- The twin that shows what ALTER TABLE does has no foreign keys.  Those of the
-- column are tried one by one, with an empty table of ours at the other end.
CREATE FUNCTION risky_migrations.twin_foreign_key(fk oid, relid oid, twin text, peer text)
RETURNS TABLE (peer_refers boolean, command text) LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH k AS (
		SELECT k.conrelid, k.confrelid, k.conkey, k.confkey,
			k.conrelid = twin_foreign_key.relid AS refers,
			k.conrelid = k.confrelid AS to_itself
		FROM pg_constraint k WHERE k.oid = twin_foreign_key.fk
	), col AS (
		-- the peer's are called p1, p2, ...
		SELECT u.i, quote_ident(a.attname) AS name, 'p' || u.i AS peer_name,
			format('p%s %s%s', u.i, format_type(p.atttypid, p.atttypmod),
				(SELECT format(' COLLATE %I.%I', n.nspname, c.collname) FROM pg_collation c
					JOIN pg_namespace n ON n.oid = c.collnamespace WHERE c.oid = p.attcollation)) AS def
		FROM k
		CROSS JOIN LATERAL unnest(CASE WHEN k.refers THEN k.conkey ELSE k.confkey END,
			CASE WHEN k.refers THEN k.confkey ELSE k.conkey END) WITH ORDINALITY u (own, other, i)
		JOIN pg_attribute a ON a.attrelid = twin_foreign_key.relid AND a.attnum = u.own
		JOIN pg_attribute p ON p.attrelid = CASE WHEN k.refers THEN k.confrelid ELSE k.conrelid END
			AND p.attnum = u.other
	), list AS (
		SELECT string_agg(c.name, ', ' ORDER BY c.i) AS own, string_agg(c.peer_name, ', ' ORDER BY c.i) AS peer,
			string_agg(c.def, ', ' ORDER BY c.i) AS def
		FROM col c
	), referenced AS (
		SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY u.i) AS own
		FROM k CROSS JOIN LATERAL unnest(k.confkey) WITH ORDINALITY u (n, i)
		JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.n
	)
	SELECT NOT k.refers, c.sql
	FROM k, list l, referenced r
	CROSS JOIN LATERAL (VALUES
		(1, NOT k.to_itself, format('CREATE TABLE %s (%s%s)', twin_foreign_key.peer, l.def,
			CASE WHEN k.refers THEN format(', UNIQUE (%s)', l.peer) ELSE '' END)),
		(2, k.to_itself, format('ALTER TABLE %s ADD FOREIGN KEY (%s) REFERENCES %s (%s)',
			twin_foreign_key.twin, l.own, twin_foreign_key.twin, r.own)),
		(2, k.refers AND NOT k.to_itself, format('ALTER TABLE %s ADD FOREIGN KEY (%s) REFERENCES %s (%s)',
			twin_foreign_key.twin, l.own, twin_foreign_key.peer, l.peer)),
		(2, NOT k.refers, format('ALTER TABLE %s ADD FOREIGN KEY (%s) REFERENCES %s (%s)',
			twin_foreign_key.peer, l.peer, twin_foreign_key.twin, l.own))) c (ord, applies, sql)
	WHERE c.applies
	ORDER BY c.ord;
END;
COMMENT ON FUNCTION risky_migrations.twin_foreign_key(oid, oid, text, text) IS
	'commands that give a twin a foreign key like one of the original''s, and make the table at its other end; does that one refer to the twin?';

CREATE FUNCTION risky_migrations.direct_obstacles(relid oid, attnum smallint)
RETURNS TABLE (obstacle text) LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid) COLLATE "C"
	FROM pg_depend d
	WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = direct_obstacles.relid
		AND d.refobjsubid = direct_obstacles.attnum
		AND d.classid IN ('pg_rewrite'::regclass, 'pg_trigger'::regclass, 'pg_policy'::regclass,
			'pg_proc'::regclass, 'pg_publication_rel'::regclass)
	ORDER BY 1;
END;
COMMENT ON FUNCTION risky_migrations.direct_obstacles(oid, smallint) IS
	'what refers to a column so that ALTER TABLE refuses to change its type: views, rules, triggers, policies, functions, publications';

-----------------------------------------------------------------------
-- Steer
-----------------------------------------------------------------------

CREATE FUNCTION rm_pause(migration bigint DEFAULT NULL) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_pause' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_pause(bigint) IS
	'has a migration hold nothing and wait, from its next batch on and at once where it waits already; returns its id';

CREATE FUNCTION rm_resume(migration bigint DEFAULT NULL) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_resume' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_resume(bigint) IS
	'ends a pause; a migration that nobody runs goes on in a background worker, as the caller, from its last committed batch; returns its id';

CREATE FUNCTION rm_cancel(migration bigint DEFAULT NULL) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_cancel' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_cancel(bigint) IS
	'stops whoever runs a migration, with an error, at once; what is done stays (rm_rollback takes it back); returns its id';

-----------------------------------------------------------------------
-- Know
-----------------------------------------------------------------------

CREATE FUNCTION rm_check_conversion(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL, max_rows bigint DEFAULT 100,
	OUT row_key text, OUT value text, OUT sqlstate text, OUT message text,
	OUT rows_like_it bigint)
RETURNS SETOF record AS 'MODULE_PATHNAME', 'rm_check_conversion' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_check_conversion(text, text, text, text, bigint) IS
	'the rows whose value would not convert, at most max_rows of them, and how many fail for the same reason; reads the table with ACCESS SHARE only';

CREATE FUNCTION rm_advise(relation text, column_name text, new_type text,
	using_expr text DEFAULT NULL,
	OUT rewrites boolean, OUT indexes_rebuilt text[], OUT scans text[], OUT lock_mode text,
	OUT also_locked text[], OUT bytes_written bigint, OUT rows_estimated bigint,
	OUT method text, OUT reason text, OUT refusals text[])
AS 'MODULE_PATHNAME', 'rm_advise' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_advise(text, text, text, text) IS
	'what plain ALTER TABLE would do under its lock (rewrite the table, rebuild indexes, read tables to check constraints; NULL where that cannot be tried), the other tables that it locks as well, bytes it would write at today''s sizes, the method that auto chooses and why, and what each method refuses; changes nothing, ACCESS SHARE only';

-----------------------------------------------------------------------
-- Watch
-----------------------------------------------------------------------

CREATE VIEW risky_migrations.migration_columns WITH (security_barrier) AS
SELECT m.id AS migration_id,
	string_agg(c.column_name, ', ' ORDER BY c.number) AS column_name,
	string_agg(c.old_type, ', ' ORDER BY c.number) AS old_type,
	string_agg(c.new_type, ', ' ORDER BY c.number) AS new_type,
	string_agg(c.using_expr, ', ' ORDER BY c.number) AS using_expr
FROM risky_migrations.migration m
LEFT JOIN LATERAL (
	SELECT 1, m.column_name, m.old_type, m.new_type, m.using_expr WHERE m.attnum <> 0
	UNION ALL
	SELECT f.number, f.column_name, f.old_type, f.new_type, f.using_expr
	FROM risky_migrations.further_column f WHERE f.migration_id = m.id
) c (number, column_name, old_type, new_type, using_expr) ON true
WHERE risky_migrations.may_see(m.relid, m.owner)
GROUP BY m.id;
GRANT SELECT ON risky_migrations.migration_columns TO PUBLIC;
COMMENT ON VIEW risky_migrations.migration_columns IS 'the columns that a migration changes, for people; NULL where none is';

CREATE VIEW rm_migrations WITH (security_barrier) AS
SELECT m.id, m.relation, f.column_name, f.old_type, f.new_type, f.using_expr,
	m.method, m.method_reason, m.state, m.steps_done,
	r.pid AS running_pid,
	CASE WHEN m.state <> 'open' THEN NULL
		WHEN s.wanted <> 'run' THEN s.wanted
		WHEN r.pid IS NULL THEN 'not running'
		WHEN s.background THEN 'running in background'
		ELSE 'running in foreground' END AS run_state,
	l.step AS last_step, l.direction AS last_direction,
	CASE WHEN l.state = 'running' AND r.pid IS NULL THEN 'interrupted' ELSE l.state END AS last_step_state,
	l.sqlstate, l.message, l.detail, l.hint,
	CASE WHEN m.state <> 'open' THEN NULL
		WHEN r.pid IS NOT NULL THEN CASE WHEN s.wanted = 'paused' THEN format('SELECT rm_resume(%s)', m.id) END
		WHEN (s.all_steps OR s.wanted <> 'run') AND NOT coalesce(l.direction = 'rollback' AND l.state <> 'done', false)
			AND EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = m.relid)
			THEN CASE WHEN risky_migrations.step_name(m.method, m.steps_done) IN ('swap', 'cut_over') AND s.cut_over = 'manual'
					THEN format('CALL rm_cut_over(%s)', m.id)
				WHEN risky_migrations.step_name(m.method, m.steps_done) = 'cleanup'
					THEN format('CALL rm_cleanup(%s)', m.id)
				WHEN risky_migrations.step_name(m.method, m.steps_done) IS NOT NULL
					THEN format('SELECT rm_resume(%s)', m.id) END
		WHEN m.method = 'direct' OR m.steps_done = 0
			OR l.direction = 'rollback' AND l.state <> 'done'
			OR NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = m.relid)
			THEN format('CALL rm_rollback(%s)', m.id)
		WHEN m.steps_done = 1 THEN format('CALL rm_backfill_batched(100000, %s)', m.id)
		WHEN m.steps_done = 2 THEN format('CALL rm_enforce_not_null(%s)', m.id)
		WHEN m.steps_done < 5 THEN format('CALL rm_swap(%s)', m.id)
		ELSE format('CALL rm_cleanup(%s)', m.id)
	END AS next_call,
	CASE WHEN NOT m.swapped OR m.state <> 'open' THEN NULL
		WHEN m.reverse_tree IS NULL THEN 'closed: no cast leads back, and no reverse_expr was given'
		WHEN EXISTS (SELECT FROM risky_migrations.conversion_error e
			WHERE e.migration_id = m.id AND e.way_back)
			THEN 'closed: values that do not fit the old type, see rm_conversion_errors'
		ELSE 'open' END AS way_back,
	m.created_at
FROM risky_migrations.migration m
JOIN risky_migrations.migration_columns f ON f.migration_id = m.id
LEFT JOIN risky_migrations.steering s ON s.migration_id = m.id
LEFT JOIN LATERAL (
	SELECT k.pid FROM pg_catalog.pg_locks k
	WHERE k.locktype = 'advisory' AND k.objsubid = 3 AND k.granted
	AND k.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
	AND (k.classid::bigint << 32) | k.objid::bigint = m.id) r ON true
LEFT JOIN LATERAL (
	SELECT s.* FROM risky_migrations.step_log s
	WHERE s.migration_id = m.id ORDER BY s.id DESC LIMIT 1) l ON true
WHERE risky_migrations.may_see(m.relid, m.owner);
COMMENT ON VIEW rm_migrations IS
	'every migration of tables one may act as the owner of: state, last step, its error, and what to call next';

CREATE VIEW rm_progress WITH (security_barrier) AS
SELECT m.id AS migration, m.relation, l.step, l.direction, l.pid, l.started_at,
	p.blocks_done, p.blocks_total,
	round(100.0 * p.blocks_done / p.blocks_total, 1) AS percent,
	p.rows_done, p.rows_total,
	round((p.rows_done - p.rows_first) / nullif(p.seconds, 0)) AS rows_per_second,
	clock_timestamp() + (p.blocks_total - p.blocks_done) * p.seconds
		/ nullif(greatest(p.blocks_done - p.blocks_first, 0), 0) * interval '1 s' AS estimated_end,
	CASE WHEN w.mode IS NOT NULL THEN 'lock' WHEN s.wanted = 'paused' THEN 'paused' ELSE l.wait_kind END AS waiting_for,
	CASE WHEN w.mode IS NOT NULL THEN
		format('%s on %s, held or asked for before by %s', w.mode, w.object,
			coalesce((SELECT string_agg(DISTINCT CASE WHEN b = 0 THEN 'a prepared transaction' ELSE 'process ' || b END, ', ')
				FROM unnest(pg_blocking_pids(l.pid)) b), 'nobody any more'))
		WHEN l.wait_kind = 'worker' THEN l.wait_reason || coalesce(': ' || c.phase, '')
		ELSE l.wait_reason END AS waiting_reason,
	CASE WHEN w.mode IS NOT NULL THEN w.waitstart ELSE l.wait_since END AS waiting_since,
	l.lock_retries, a.wait_event_type, a.wait_event,
	coalesce(s.wanted = 'paused', false) AS paused, l.progress[7]::int AS workers
FROM risky_migrations.migration m
JOIN risky_migrations.step_log l ON l.migration_id = m.id AND l.state = 'running'
LEFT JOIN risky_migrations.steering s ON s.migration_id = m.id
CROSS JOIN LATERAL (
	SELECT l.progress[1] AS blocks_first, nullif(l.progress[3], 0) AS blocks_total,
		CASE WHEN l.progress[3] > 0 THEN l.progress[2] END AS blocks_done,
		l.progress[4] AS rows_first, nullif(l.progress[6], 0) AS rows_total,
		CASE WHEN l.progress[3] > 0 THEN l.progress[5] END AS rows_done,
		extract(epoch FROM clock_timestamp() - l.started_at) AS seconds) p
LEFT JOIN LATERAL (
	SELECT k.mode, k.waitstart,
		CASE WHEN k.relation IS NULL THEN 'a ' || k.locktype ELSE k.relation::regclass::text END AS object
	FROM pg_catalog.pg_locks k WHERE k.pid = l.pid AND NOT k.granted LIMIT 1) w ON true
LEFT JOIN LATERAL (
	SELECT i.phase || CASE WHEN i.current_locker_pid > 0 THEN format(' (process %s)', i.current_locker_pid)
		WHEN i.blocks_total > 0 THEN format(' (%s %%)', 100 * i.blocks_done / i.blocks_total)
		WHEN i.tuples_total > 0 THEN format(' (%s %%)', 100 * i.tuples_done / i.tuples_total) ELSE '' END AS phase
	FROM pg_catalog.pg_stat_progress_create_index i WHERE i.relid = l.relid AND i.datname = current_database()
	UNION ALL
	SELECT n.phase || CASE WHEN n.sample_blks_total > 0 THEN format(' (%s %%)',
		100 * n.sample_blks_scanned / n.sample_blks_total) ELSE '' END
	FROM pg_catalog.pg_stat_progress_analyze n WHERE n.relid = l.relid AND n.datname = current_database()
	LIMIT 1) c ON l.wait_kind = 'worker'
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE risky_migrations.may_see(m.relid, m.owner)
	-- what a crash has left as running has no runner
	AND EXISTS (SELECT FROM pg_catalog.pg_locks k
		WHERE k.locktype = 'advisory' AND k.objsubid = 3 AND k.granted AND k.pid = l.pid
		AND k.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
		AND (k.classid::bigint << 32) | k.objid::bigint = m.id);
COMMENT ON VIEW rm_progress IS
	'the steps that are running: pages and rows done and total, rows per second and end estimated from the whole call, and what it waits for right now (lock, row lock, snapshot, worker, constraint, pause, replica lag, slot, archive, query, wraparound vacuum)';

CREATE VIEW rm_conversion_errors WITH (security_barrier) AS
SELECT DISTINCT ON (e.migration_id, e.row_key)
	e.migration_id AS migration, m.relation, f.column_name, e.row_key, e.value,
	e.sqlstate, e.message, e.way_back, e.at
FROM risky_migrations.conversion_error e
JOIN risky_migrations.migration m ON m.id = e.migration_id
JOIN risky_migrations.migration_columns f ON f.migration_id = m.id
WHERE risky_migrations.may_see(m.relid, m.owner)
ORDER BY e.migration_id, e.row_key, e.at DESC;
COMMENT ON VIEW rm_conversion_errors IS
	'values that did not convert, the last one of each row; a hint, since the row may have been mended or deleted';

CREATE VIEW risky_migrations.lock_report WITH (security_barrier) AS
SELECT s.approach, s.step || CASE s.direction WHEN 'rollback' THEN ' (rollback)' ELSE '' END AS step,
	k.relation, k.role, k.lock_mode, k.blocks_reads, k.blocks_writes,
	round(k.wait_ms::numeric, 3) AS wait_ms, round(k.hold_ms::numeric, 3) AS hold_ms,
	k.hold_is_exact, k.rewritten, s.started_at,
	s.id AS step_id, k.times
FROM risky_migrations.step_lock k
JOIN risky_migrations.step_log s ON s.id = k.step_id
WHERE risky_migrations.may_see(s.relid, s.owner);
GRANT SELECT ON risky_migrations.lock_report TO PUBLIC;
COMMENT ON VIEW risky_migrations.lock_report IS 'what rm_lock_report() shows';

CREATE FUNCTION rm_lock_report(OUT approach text, OUT step text, OUT relation text,
	OUT role text, OUT lock_mode text, OUT blocks_reads boolean,
	OUT blocks_writes boolean, OUT wait_ms numeric, OUT hold_ms numeric,
	OUT hold_is_exact boolean, OUT rewritten boolean, OUT started_at timestamptz)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT r.approach, r.step, r.relation, r.role, r.lock_mode, r.blocks_reads,
		r.blocks_writes, r.wait_ms, r.hold_ms, r.hold_is_exact, r.rewritten, r.started_at
	FROM risky_migrations.lock_report r
	ORDER BY r.step_id, r.relation, r.lock_mode;
END;
COMMENT ON FUNCTION rm_lock_report() IS
	'the locks of every step run so far on user relations; wait and hold in milliseconds, the longest of the step''s transactions, exact or upper bounds; a new table is one that the step has just made, a dropped index one that nobody could use, which block nobody; transactions are those that CREATE INDEX CONCURRENTLY has waited for';

CREATE FUNCTION rm_blocked_queries(OUT waiting_pid integer, OUT waiting_query text,
	OUT relation text, OUT lock_mode text, OUT waited interval,
	OUT blocking_pid integer, OUT blocking_query text, OUT blocking_state text,
	OUT depth integer)
RETURNS SETOF record LANGUAGE sql VOLATILE
BEGIN ATOMIC
	WITH RECURSIVE waiting AS MATERIALIZED (
		SELECT l.pid, l.mode, l.waitstart, l.relation,
			pg_blocking_pids(l.pid) AS blockers
		FROM pg_catalog.pg_locks l WHERE NOT l.granted
	), edge AS (
		SELECT DISTINCT w.pid, b AS blocker
		FROM waiting w, unnest(w.blockers) b
	), chain (pid, depth) AS (
		SELECT e.pid, 1 FROM edge e
		WHERE NOT EXISTS (SELECT FROM waiting w WHERE w.pid = e.blocker)
		UNION
		SELECT e.pid, c.depth + 1 FROM chain c JOIN edge e ON e.blocker = c.pid
		WHERE c.depth < 100
	)
	SELECT w.pid, a.query,
		coalesce(w.relation, t.relation)::regclass::text, w.mode,
		clock_timestamp() - w.waitstart,
		e.blocker, b.query, coalesce(b.state, 'prepared transaction'),
		(SELECT max(c.depth) FROM chain c WHERE c.pid = w.pid)
	FROM waiting w
	JOIN edge e ON e.pid = w.pid
	LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = w.pid
	LEFT JOIN pg_catalog.pg_stat_activity b ON b.pid = e.blocker
	LEFT JOIN LATERAL (SELECT k.relation FROM pg_catalog.pg_locks k
		WHERE k.pid = w.pid AND k.locktype = 'tuple' LIMIT 1) t ON true
	ORDER BY 9, w.waitstart, w.pid, e.blocker;
END;
COMMENT ON FUNCTION rm_blocked_queries() IS
	'who waits for a lock and for whom, one row for each blocker; depth 1 is blocked by one that does not wait itself';

CREATE FUNCTION rm_active_queries(OUT pid integer, OUT role name, OUT backend_type text,
	OUT state text, OUT running_for interval, OUT transaction_for interval,
	OUT wait_event_type text, OUT wait_event text, OUT blocked_by integer[],
	OUT query text)
RETURNS SETOF record LANGUAGE sql VOLATILE
BEGIN ATOMIC
	SELECT a.pid, a.usename, a.backend_type, a.state,
		clock_timestamp() - a.query_start, clock_timestamp() - a.xact_start,
		a.wait_event_type, a.wait_event,
		CASE WHEN a.wait_event_type = 'Lock' THEN pg_blocking_pids(a.pid) ELSE '{}' END,
		a.query
	FROM pg_catalog.pg_stat_activity a
	WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
		AND a.state IS DISTINCT FROM 'idle'
	ORDER BY a.xact_start NULLS LAST, a.pid;
END;
COMMENT ON FUNCTION rm_active_queries() IS
	'what the other sessions of this database are doing, the oldest transaction first';

CREATE FUNCTION rm_table_sizes(OUT relation text, OUT rows_estimated bigint,
	OUT heap_bytes bigint, OUT toast_bytes bigint, OUT index_bytes bigint,
	OUT total_bytes bigint, OUT total text)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT c.oid::regclass::text, nullif(c.reltuples, -1)::bigint,
		pg_relation_size(c.oid),
		coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0),
		pg_indexes_size(c.oid), pg_total_relation_size(c.oid),
		pg_size_pretty(pg_total_relation_size(c.oid))
	FROM pg_catalog.pg_class c
	JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	WHERE c.relkind IN ('r', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'risky_migrations')
		AND n.nspname !~ '^pg_(toast|temp)'
	ORDER BY pg_total_relation_size(c.oid) DESC, 1;
END;
COMMENT ON FUNCTION rm_table_sizes() IS
	'size of every table in bytes: heap, TOAST, indexes, total; rows as last estimated';

-----------------------------------------------------------------------
-- Probes
-----------------------------------------------------------------------

CREATE FUNCTION rm_probe_start(query text, every interval DEFAULT '10 ms',
	timeout interval DEFAULT '5 s', time_limit interval DEFAULT '1 hour')
RETURNS bigint AS 'MODULE_PATHNAME', 'rm_probe_start' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_probe_start(text, interval, interval, interval) IS
	'starts a background worker that runs the query every so often as the caller and records each latency; returns its id; it begins when the transaction commits';

CREATE FUNCTION rm_probe_stop(id bigint) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_probe_stop' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_probe_stop(bigint) IS
	'ends a probe of one''s own; returns the number of samples it has recorded';

CREATE VIEW rm_probes WITH (security_barrier) AS
SELECT p.id, p.query, p.every, p.timeout, p.time_limit, p.started_at, p.ended_at,
	p.end_reason, k.pid IS NOT NULL AS running, k.pid
FROM risky_migrations.probe p
LEFT JOIN LATERAL (
	SELECT k.pid FROM pg_catalog.pg_locks k
	WHERE k.locktype = 'advisory' AND k.objsubid = 4 AND k.granted
	AND k.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
	AND (k.classid::bigint << 32) | k.objid::bigint = p.id) k ON true
WHERE pg_has_role(p.owner, 'USAGE');
COMMENT ON VIEW rm_probes IS 'one''s own probes, running and ended';

CREATE VIEW rm_probe_results WITH (security_barrier) AS
SELECT s.probe_id, s.at, s.latency_ms, s.outcome, s.sqlstate, s.message
FROM risky_migrations.probe_sample s
JOIN risky_migrations.probe p ON p.id = s.probe_id
WHERE pg_has_role(p.owner, 'USAGE');
COMMENT ON VIEW rm_probe_results IS
	'what one''s own probes have measured: at is when a run was due, latency_ms from then to its end, outcome ok, timeout or error';

GRANT SELECT ON rm_migrations, rm_progress, rm_conversion_errors, rm_probes, rm_probe_results TO PUBLIC;

-----------------------------------------------------------------------
-- The lab
-----------------------------------------------------------------------

CREATE FUNCTION risky_migrations.is_lab_form(value text) RETURNS boolean
AS 'MODULE_PATHNAME', 'rm_is_lab_form' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.is_lab_form(text) IS
	'is it written YYYY-MM-DD HH:MM:SS, so that the way back from a timestamp is exact?';

CREATE FUNCTION risky_migrations.lab_moment(n bigint) RETURNS text
AS 'MODULE_PATHNAME', 'rm_lab_moment' LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION risky_migrations.lab_moment(bigint) IS
	'the n-th of the seeded moments: 2024-01-01 10:00:00 and n - 1 seconds';

CREATE FUNCTION risky_migrations.lab_write(rows bigint) RETURNS text
AS 'MODULE_PATHNAME', 'rm_lab_write' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION risky_migrations.lab_write(bigint) IS
	'inserts a row into large_record and updates one of the first rows, both with the truth in their names; returns what was written';

CREATE PROCEDURE rm_migrate(target text)
AS 'MODULE_PATHNAME', 'rm_migrate' LANGUAGE C;
COMMENT ON PROCEDURE rm_migrate(text) IS
	'takes the lab in the current schema to a migration, 0001 to 0005, forth or back; zero drops its tables';

CREATE FUNCTION rm_seed(n bigint, batch bigint DEFAULT 10000) RETURNS bigint
AS 'MODULE_PATHNAME', 'rm_seed' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_seed(bigint, bigint) IS
	'fills the lab''s large_record with n rows (and small_record with 100), replacing what they held; returns n';

CREATE FUNCTION rm_list_large() RETURNS json
AS 'MODULE_PATHNAME', 'rm_list_large' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_list_large() IS
	'the lab''s endpoint: the first ten rows of large_record as {"records": [{"id", "name", "created_at"}, ...], "count": 10}';

CREATE FUNCTION rm_lab_check(OUT rows_checked bigint, OUT rows_wrong bigint)
AS 'MODULE_PATHNAME', 'rm_lab_check' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION rm_lab_check() IS
	'compares every row of large_record with the truth that its name tells';

CREATE PROCEDURE rm_compare(rows bigint DEFAULT 1000000, every interval DEFAULT '10 ms',
	timeout interval DEFAULT '5 s')
AS 'MODULE_PATHNAME', 'rm_compare' LANGUAGE C;
COMMENT ON PROCEDURE rm_compare(bigint, interval, interval) IS
	'runs the direct change and the three steps one after the other on fresh tables of so many rows, under a read and a write probe; see rm_comparison() and rm_timeline()';

-- whoever may read a lab's large table sees what was done to it anyway; of
-- another lab one can only tell that it is there
CREATE VIEW risky_migrations.lab_shown WITH (security_barrier) AS
SELECT l.nspid, risky_migrations.may_see(l.large_relid, l.owner)
	OR has_table_privilege(l.large_relid, 'SELECT') AS shown
FROM risky_migrations.lab l
-- a lab that has lost a table is none
WHERE (SELECT count(*) FROM pg_catalog.pg_class c
	WHERE c.oid IN (l.small_relid, l.large_relid) AND c.relnamespace = l.nspid
		AND c.relname IN ('small_record', 'large_record')) = 2;
GRANT SELECT ON risky_migrations.lab_shown TO PUBLIC;
COMMENT ON VIEW risky_migrations.lab_shown IS 'the labs that are there, and whether one may see what was done to them';

-- the filter stands outside of the UNION: inside it would not be a barrier
CREATE VIEW risky_migrations.lab_step WITH (security_barrier) AS
SELECT u.nspid, u.relid, u.method, u.steps_done, u.step, u.started_at, u.duration_ms
FROM (
	SELECT l.nspid, m.relid, m.owner, m.method, m.steps_done, s.step, s.started_at,
		s.duration_ms
	FROM risky_migrations.lab l
	JOIN risky_migrations.migration m ON m.relid IN (l.small_relid, l.large_relid)
		AND m.state IN ('open', 'done')
	JOIN risky_migrations.step_log s ON s.migration_id = m.id
		AND s.direction = 'apply' AND s.state = 'done'
	UNION ALL
	SELECT l.nspid, s.relid, s.owner, s.approach, 1, s.step, s.started_at, s.duration_ms
	FROM risky_migrations.lab l
	JOIN risky_migrations.step_log s ON s.relid = l.large_relid AND s.approach = 'lab'
		AND s.direction = 'apply' AND s.state = 'done'
	OFFSET 0) u
WHERE (SELECT s.shown FROM risky_migrations.lab_shown s WHERE s.nspid = u.nspid);
GRANT SELECT ON risky_migrations.lab_step TO PUBLIC;
COMMENT ON VIEW risky_migrations.lab_step IS 'the steps of the lab that are in force';

CREATE FUNCTION rm_showmigrations(OUT applied text, OUT number text, OUT name text,
	OUT applied_at timestamptz, OUT duration interval)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	WITH lab AS (
		SELECT s.* FROM risky_migrations.lab_step s
		WHERE s.nspid = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = current_schema())
	), known (number, name, method, step, nth) AS (
		VALUES ('0001', 'create small_record and large_record', 'lab', 'create_tables', 1),
			('0002', 'direct: ALTER COLUMN created_at TYPE timestamp', 'direct', 'alter_type', 1),
			('0003', 'three_step: add column created_at_new and its trigger', 'three_step', 'add_column', 1),
			('0004', 'three_step: backfill in batches', 'three_step', 'backfill', 2),
			('0005', 'three_step: NOT NULL', 'three_step', 'enforce_not_null', 3)
	)
	SELECT CASE WHEN s.n > 0 THEN '[X]'
			WHEN EXISTS (SELECT FROM risky_migrations.lab_shown l
				WHERE l.nspid = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = current_schema())
				AND NOT l.shown) THEN '[?]'
			ELSE '[ ]' END,
		k.number, k.name, s.applied_at, s.duration
	FROM known k
	LEFT JOIN LATERAL (
		SELECT count(*) AS n, max(x.started_at) AS applied_at,
			sum(x.duration_ms) * interval '1 ms' AS duration
		FROM (SELECT DISTINCT ON (l.relid) l.* FROM lab l
			WHERE l.method = k.method AND l.step = k.step AND l.steps_done >= k.nth
			ORDER BY l.relid, l.started_at DESC) x
		-- 0002 is both tables or none
		HAVING count(*) = CASE k.number WHEN '0002' THEN 2 ELSE 1 END) s ON true
	ORDER BY k.number;
END;
COMMENT ON FUNCTION rm_showmigrations() IS
	'the migrations of the lab in the current schema: applied or not ([?] to whoever may not read large_record), when, and how long it took';

CREATE VIEW risky_migrations.comparison_step WITH (security_barrier) AS
SELECT c.id AS comparison_id, s.id AS step_id, s.step, s.relation, s.started_at,
	s.duration_ms, s.wal_bytes
FROM risky_migrations.comparison c
JOIN risky_migrations.step_log s ON s.id BETWEEN c.first_step AND c.last_step
	AND s.owner = c.owner AND s.approach = c.approach AND s.direction = 'apply'
WHERE pg_has_role(c.owner, 'USAGE');
CREATE VIEW risky_migrations.comparison_latest WITH (security_barrier) AS
SELECT c.* FROM risky_migrations.comparison c
WHERE pg_has_role(c.owner, 'USAGE')
	AND c.run_id = (SELECT max(x.run_id) FROM risky_migrations.comparison x
		WHERE pg_has_role(x.owner, 'USAGE'));
GRANT SELECT ON risky_migrations.comparison_step, risky_migrations.comparison_latest TO PUBLIC;
COMMENT ON VIEW risky_migrations.comparison_step IS 'the steps of each approach that was compared';
COMMENT ON VIEW risky_migrations.comparison_latest IS 'the approaches of the last rm_compare';

CREATE FUNCTION rm_comparison(OUT approach text, OUT rows bigint, OUT total_ms numeric,
	OUT step_ms json, OUT read_longest_ms numeric, OUT read_p99_ms numeric,
	OUT write_longest_ms numeric, OUT write_p99_ms numeric, OUT timeouts bigint,
	OUT errors bigint, OUT probes_made bigint, OUT wal_bytes bigint,
	OUT heap_bytes_before bigint, OUT heap_bytes_after bigint,
	OUT index_bytes_before bigint, OUT index_bytes_after bigint,
	OUT rows_checked bigint, OUT rows_wrong bigint)
RETURNS SETOF record LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT c.approach, c.rows, s.total_ms, s.step_ms,
		r.longest, r.p99, w.longest, w.p99,
		r.timeouts + w.timeouts, r.errors + w.errors, r.n + w.n, s.wal_bytes,
		c.heap_bytes_before, c.heap_bytes_after, c.index_bytes_before,
		c.index_bytes_after, c.rows_checked, c.rows_wrong
	FROM risky_migrations.comparison_latest c
	CROSS JOIN LATERAL (
		SELECT round(sum(x.duration_ms)::numeric, 1) AS total_ms,
			json_object_agg(x.step || CASE x.step WHEN 'alter_type' THEN ' ' || x.relation ELSE '' END,
				round(x.duration_ms::numeric, 1) ORDER BY x.step_id) AS step_ms,
			sum(x.wal_bytes)::bigint AS wal_bytes
		FROM risky_migrations.comparison_step x WHERE x.comparison_id = c.id) s
	CROSS JOIN LATERAL (
		SELECT round(max(x.latency_ms)::numeric, 1) AS longest,
			round((percentile_disc(0.99) WITHIN GROUP (ORDER BY x.latency_ms))::numeric, 1) AS p99,
			count(*) FILTER (WHERE x.outcome = 'timeout') AS timeouts,
			count(*) FILTER (WHERE x.outcome = 'error') AS errors, count(*) AS n
		FROM rm_probe_results x WHERE x.probe_id = c.read_probe) r
	CROSS JOIN LATERAL (
		SELECT round(max(x.latency_ms)::numeric, 1) AS longest,
			round((percentile_disc(0.99) WITHIN GROUP (ORDER BY x.latency_ms))::numeric, 1) AS p99,
			count(*) FILTER (WHERE x.outcome = 'timeout') AS timeouts,
			count(*) FILTER (WHERE x.outcome = 'error') AS errors, count(*) AS n
		FROM rm_probe_results x WHERE x.probe_id = c.write_probe) w
	ORDER BY c.id;
END;
COMMENT ON FUNCTION rm_comparison() IS
	'the last rm_compare: times in milliseconds, latencies as the probes saw them, WAL written by the migration itself, sizes in bytes, rows checked and wrong';

CREATE FUNCTION rm_timeline() RETURNS SETOF text LANGUAGE sql STABLE
BEGIN ATOMIC
	-- 60 columns stand for the time of the slowest approach, the same for all
	WITH run AS (
		SELECT c.*, extract(epoch FROM c.finished_at - c.started_at) AS seconds,
			max(extract(epoch FROM c.finished_at - c.started_at)) OVER () AS width
		FROM risky_migrations.comparison_latest c
	), lane (comparison_id, ord, sub, label, tail, cells) AS (
		SELECT r.id, 2, s.step_id, s.step || CASE WHEN s.step = 'alter_type' THEN ' ' || regexp_replace(s.relation, '^.*\.', '') ELSE '' END,
			to_char(s.duration_ms, 'FM999,999,990') || ' ms',
			(SELECT string_agg(CASE WHEN x BETWEEN
					floor(60 * extract(epoch FROM s.started_at - r.started_at) / r.width)
					AND floor(60 * (extract(epoch FROM s.started_at - r.started_at) + s.duration_ms / 1000) / r.width)
					THEN '█' ELSE ' ' END, '' ORDER BY x) FROM generate_series(0, 59) x)
		FROM run r JOIN risky_migrations.comparison_step s ON s.comparison_id = r.id
		UNION ALL
		SELECT r.id, 3, p.ord, p.label,
			'max ' || to_char(l.longest, 'FM999,999,990') || ' ms',
			(SELECT string_agg(CASE WHEN x.x > floor(60 * r.seconds / r.width) THEN ' '
					WHEN b.worst >= 1000 THEN '█' WHEN b.worst >= 250 THEN '▓'
					WHEN b.worst >= 50 THEN '▒' WHEN b.worst IS NULL THEN ' ' ELSE '·' END,
					'' ORDER BY x.x)
			FROM generate_series(0, 59) x (x)
			LEFT JOIN (
				SELECT cell, max(v.latency_ms) AS worst
				FROM rm_probe_results v,
					generate_series(
						floor(60 * extract(epoch FROM v.at - r.started_at) / r.width)::int,
						floor(60 * (extract(epoch FROM v.at - r.started_at) + v.latency_ms / 1000) / r.width)::int) cell
				WHERE v.probe_id = p.probe GROUP BY cell) b ON b.cell = x.x)
		FROM run r
		CROSS JOIN LATERAL (VALUES (1, 'reads', r.read_probe), (2, 'writes', r.write_probe)) p (ord, label, probe)
		CROSS JOIN LATERAL (SELECT max(v.latency_ms) AS longest FROM rm_probe_results v WHERE v.probe_id = p.probe) l
		UNION ALL
		SELECT r.id, 1, 0, r.approach, to_char(r.width, 'FM9,990.0') || ' s',
			'0 s' || repeat(' ', 57)
		FROM run r
		UNION ALL
		SELECT r.id, 4, 0, '', '', NULL FROM run r
	)
	SELECT CASE WHEN l.cells IS NULL THEN ''
		ELSE rpad(left(l.label, 24), 24) || ' |' || l.cells || '| ' || left(l.tail, 12) END
	FROM lane l ORDER BY l.comparison_id, l.ord, l.sub;
END;
COMMENT ON FUNCTION rm_timeline() IS
	'the last rm_compare as lines of text: each step, and where reads and writes stood still (▒ from 50 ms, ▓ from 250 ms, █ from 1 s)';
