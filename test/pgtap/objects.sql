-- Catalog facts: what the extension consists of, where it lives, and how each
-- of its functions may be called.
\set ON_ERROR_STOP 1
CREATE EXTENSION IF NOT EXISTS pgtap;
CREATE SCHEMA tools;
CREATE EXTENSION risky_migrations SCHEMA tools;

BEGIN;
SELECT no_plan();

-- every object that belongs to the extension
CREATE TEMP VIEW member AS
SELECT d.classid::regclass::text AS catalog, d.objid, i.type, i.schema, i.name, i.identity
FROM pg_depend d, LATERAL pg_identify_object(d.classid, d.objid, d.objsubid) i
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
	AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'risky_migrations');

-- signatures: kind, volatility, strictness, parallel safety, arguments with their defaults, result
CREATE TEMP VIEW signature AS
SELECT m.schema, p.proname::text AS name,
	format('%s %s(%s)%s %s%s%s', CASE p.prokind WHEN 'p' THEN 'procedure' ELSE 'function' END, p.proname,
		pg_get_function_arguments(p.oid), coalesce(' ' || pg_get_function_result(p.oid), ''),
		CASE p.provolatile WHEN 'v' THEN 'volatile' WHEN 's' THEN 'stable' ELSE 'immutable' END,
		CASE WHEN p.proisstrict THEN ' strict' ELSE '' END,
		CASE p.proparallel WHEN 's' THEN ' parallel safe' ELSE '' END) AS signature
FROM member m JOIN pg_proc p ON p.oid = m.objid AND m.catalog = 'pg_proc';

SELECT bag_eq($$SELECT signature FROM signature WHERE schema = 'tools'$$, ARRAY[
	'procedure rm_add_column(IN relation text, IN column_name text, IN new_type text, IN using_expr text DEFAULT NULL::text, IN reverse_expr text DEFAULT NULL::text) volatile',
	'procedure rm_alter_type(IN relation text, IN column_name text, IN new_type text, IN using_expr text DEFAULT NULL::text, IN method text DEFAULT ''three_step''::text, IN reverse_expr text DEFAULT NULL::text, IN cut_over text DEFAULT ''auto''::text, IN on_error text DEFAULT ''stop''::text, IN batch bigint DEFAULT 100000) volatile',
	'function rm_start(relation text, column_name text, new_type text, using_expr text DEFAULT NULL::text, method text DEFAULT ''three_step''::text, reverse_expr text DEFAULT NULL::text, cut_over text DEFAULT ''auto''::text, on_error text DEFAULT ''stop''::text, batch bigint DEFAULT 100000) bigint volatile',
	'procedure rm_alter_types(IN relation text, IN changes jsonb, IN method text DEFAULT ''auto''::text, IN cut_over text DEFAULT ''auto''::text, IN batch bigint DEFAULT 100000) volatile',
	'function rm_start(relation text, changes jsonb, method text DEFAULT ''auto''::text, cut_over text DEFAULT ''auto''::text, batch bigint DEFAULT 100000) bigint volatile',
	'procedure rm_cut_over(IN migration bigint DEFAULT NULL::bigint) volatile',
	'function rm_pause(migration bigint DEFAULT NULL::bigint) bigint volatile',
	'function rm_resume(migration bigint DEFAULT NULL::bigint) bigint volatile',
	'function rm_cancel(migration bigint DEFAULT NULL::bigint) bigint volatile',
	'procedure rm_backfill_batched(IN batch bigint DEFAULT 100000, IN migration bigint DEFAULT NULL::bigint) volatile',
	'procedure rm_enforce_not_null(IN migration bigint DEFAULT NULL::bigint) volatile',
	'procedure rm_swap(IN migration bigint DEFAULT NULL::bigint) volatile',
	'procedure rm_cleanup(IN migration bigint DEFAULT NULL::bigint) volatile',
	'procedure rm_rollback(IN migration bigint DEFAULT NULL::bigint) volatile',
	'procedure rm_migrate(IN target text) volatile',
	'procedure rm_compare(IN rows bigint DEFAULT 1000000, IN every interval DEFAULT ''00:00:00.01''::interval, IN timeout interval DEFAULT ''00:00:05''::interval) volatile',
	'function rm_check_conversion(relation text, column_name text, new_type text, using_expr text DEFAULT NULL::text, max_rows bigint DEFAULT 100, OUT row_key text, OUT value text, OUT sqlstate text, OUT message text, OUT rows_like_it bigint) SETOF record volatile',
	'function rm_advise(relation text, column_name text, new_type text, using_expr text DEFAULT NULL::text, OUT rewrites boolean, OUT indexes_rebuilt text[], OUT scans text[], OUT lock_mode text, OUT also_locked text[], OUT bytes_written bigint, OUT rows_estimated bigint, OUT method text, OUT reason text, OUT refusals text[]) record volatile',
	'function rm_lock_report(OUT approach text, OUT step text, OUT relation text, OUT role text, OUT lock_mode text, OUT blocks_reads boolean, OUT blocks_writes boolean, OUT wait_ms numeric, OUT hold_ms numeric, OUT hold_is_exact boolean, OUT rewritten boolean, OUT started_at timestamp with time zone) SETOF record stable',
	'function rm_blocked_queries(OUT waiting_pid integer, OUT waiting_query text, OUT relation text, OUT lock_mode text, OUT waited interval, OUT blocking_pid integer, OUT blocking_query text, OUT blocking_state text, OUT depth integer) SETOF record volatile',
	'function rm_active_queries(OUT pid integer, OUT role name, OUT backend_type text, OUT state text, OUT running_for interval, OUT transaction_for interval, OUT wait_event_type text, OUT wait_event text, OUT blocked_by integer[], OUT query text) SETOF record volatile',
	'function rm_table_sizes(OUT relation text, OUT rows_estimated bigint, OUT heap_bytes bigint, OUT toast_bytes bigint, OUT index_bytes bigint, OUT total_bytes bigint, OUT total text) SETOF record stable',
	'function rm_probe_start(query text, every interval DEFAULT ''00:00:00.01''::interval, timeout interval DEFAULT ''00:00:05''::interval, time_limit interval DEFAULT ''01:00:00''::interval) bigint volatile',
	'function rm_probe_stop(id bigint) bigint volatile',
	'function rm_seed(n bigint, batch bigint DEFAULT 10000) bigint volatile',
	'function rm_list_large() json volatile',
	'function rm_lab_check(OUT rows_checked bigint, OUT rows_wrong bigint) record volatile',
	'function rm_showmigrations(OUT applied text, OUT number text, OUT name text, OUT applied_at timestamp with time zone, OUT duration interval) SETOF record stable',
	'function rm_comparison(OUT approach text, OUT rows bigint, OUT total_ms numeric, OUT step_ms json, OUT read_longest_ms numeric, OUT read_p99_ms numeric, OUT write_longest_ms numeric, OUT write_p99_ms numeric, OUT timeouts bigint, OUT errors bigint, OUT probes_made bigint, OUT wal_bytes bigint, OUT heap_bytes_before bigint, OUT heap_bytes_after bigint, OUT index_bytes_before bigint, OUT index_bytes_after bigint, OUT rows_checked bigint, OUT rows_wrong bigint) SETOF record stable',
	'function rm_timeline() SETOF text stable'
], 'what people call');

SELECT bag_eq($$SELECT signature FROM signature WHERE schema = 'risky_migrations'$$, ARRAY[
	'function may_see(relid oid, owner oid) boolean stable parallel safe',
	'procedure run(IN migration bigint) volatile',
	'procedure help() volatile',
	'function step_name(method text, steps_done integer) text immutable strict parallel safe',
	'function sync() trigger volatile',
	'function log_change() trigger volatile',
	'function rewrite_ground(relid oid) text volatile',
	'function rewrite_obstacles(relid oid, attnums smallint[], new_types oid[]) TABLE(kind text, name text, reason text, hint text) stable',
	'function column_foreign_keys(relid oid, attnums smallint[]) TABLE(relid oid, peer oid, drop_sql text, add_sql text, comment_sql text, validate_sql text) volatile',
	'function steady_text(value text) text immutable strict parallel safe',
	'function column_dependents(relid oid, attnums smallint[]) TABLE(classid oid, objid oid, relation oid, depth integer) stable',
	'function column_left_behind(relid oid, attnum smallint) SETOF text stable',
	'function column_relations(relid oid, attnums smallint[]) SETOF oid stable',
	'function make_grants(relation oid) SETOF text stable',
	'function make_view(view oid, prefix text DEFAULT NULL::text) text[] stable',
	'function make_rule(rule oid) text[] stable',
	'function make_trigger(trigger oid) text[] stable',
	'function make_policy(policy oid) text[] stable',
	'function members(root oid) SETOF oid stable',
	'function ancestors(relid oid) SETOF oid stable',
	'function column_origin(relid oid, column_name text) oid stable',
	'function member_columns(relid oid, attnums smallint[]) TABLE(member oid, number smallint) stable',
	'function column_objects(relid oid, attnums smallint[]) TABLE(ord integer, kind text, name text, drop_sql text, make_sql text[], relation oid) stable',
	'function column_copies(relid oid, attnum smallint, prefix text) TABLE(ord integer, name text, relation oid, copy_name text, aside_sql text, make_sql text[], wait_sql text[], fill_sql text, take_sql text[], state text) stable',
	'function column_coercions(relid oid, attnum smallint, new_type oid) TABLE(kind text, name text, reason text, hint text) stable',
	'function column_publications(relid oid, attnums smallint[]) TABLE(kind text, objid oid, publication name, owner oid, drop_sql text, make_sql text[]) stable',
	'function copies_there(relid oid, prefix text) TABLE(ord bigint, relation oid, populated boolean, drop_sql text) stable',
	'function column_obstacles(relid oid, attnum smallint) TABLE(kind text, name text, reason text, hint text) stable',
	'function is_lab_form(value text) boolean immutable strict parallel safe',
	'function lab_moment(n bigint) text immutable strict parallel safe',
	'function lab_write(rows bigint) text volatile',
	'function dependents(relid oid, attnum smallint, shadow smallint, twin oid, twin_attnum smallint, build_column text, final_column text, prefix text, OUT ord bigint, OUT kind text, OUT name text, OUT relation oid, OUT peer oid, OUT build_name text, OUT build_sql text, OUT by_worker boolean, OUT validate_sql text, OUT make_sql text, OUT take_sql text[], OUT drop_sql text) SETOF record stable',
	'function twin_foreign_key(fk oid, relid oid, twin text, peer text) TABLE(peer_refers boolean, command text) stable',
	'function direct_obstacles(relid oid, attnum smallint) TABLE(obstacle text) stable',
	'function name_twins(relid oid, twin oid, prefix text) TABLE(command text) stable',
	'function locks_needed(method text, relid oid, attnums smallint[], toast boolean) bigint stable',
	'function leftovers(relid oid, prefix text, wanted text[]) TABLE(drop_sql text) stable',
	'function catalog_fingerprint(relid oid) text volatile'
], 'what the extension calls');

SELECT bag_eq($$SELECT format('%s %s.%s', type, schema, name) FROM member WHERE type IN ('table', 'view', 'index')$$, ARRAY[
	'table risky_migrations.migration', 'table risky_migrations.further_column', 'table risky_migrations.steering', 'table risky_migrations.skipped_row', 'table risky_migrations.range', 'table risky_migrations.leaf', 'table risky_migrations.conversion_error',
	'table risky_migrations.dependent', 'table risky_migrations.rewrite', 'table risky_migrations.rewrite_chunk',
	'table risky_migrations.step_log', 'table risky_migrations.step_lock', 'table risky_migrations.lab',
	'table risky_migrations.probe', 'table risky_migrations.probe_sample', 'table risky_migrations.comparison',
	'view risky_migrations.migration_columns', 'view risky_migrations.lock_report', 'view risky_migrations.lab_shown', 'view risky_migrations.lab_step', 'view risky_migrations.comparison_step',
	'view risky_migrations.comparison_latest',
	'view tools.rm_migrations', 'view tools.rm_progress', 'view tools.rm_conversion_errors', 'view tools.rm_probes',
	'view tools.rm_probe_results'
], 'tables and views');

SELECT set_eq($$SELECT DISTINCT type FROM member WHERE type !~ '^(table|view|sequence|function|procedure|type|schema)$|\[\]'$$,
	ARRAY[]::text[], 'nothing but schema, tables, views, functions and procedures');

-- where they live
SELECT is_empty($$SELECT identity FROM member WHERE schema NOT IN ('tools', 'risky_migrations') AND type <> 'schema'$$,
	'no object outside the two schemas');
SELECT is_empty($$SELECT identity FROM member WHERE schema = 'tools' AND name !~ '^rm_' AND type <> 'type' AND type <> 'function'$$,
	'in the schema of the extension all names begin with rm_');
SELECT is_empty($$SELECT name FROM signature WHERE schema = 'tools' AND name !~ '^rm_'$$, 'functions too');
SELECT is(count(*), 0::bigint, 'nothing in pg_catalog or public is new')
FROM member WHERE schema IN ('pg_catalog', 'public', 'information_schema');
SELECT is((SELECT extversion FROM pg_extension WHERE extname = 'risky_migrations'),
	(SELECT default_version FROM pg_available_extensions WHERE name = 'risky_migrations'), 'the version of the control file');

-- every one says what it is
SELECT is_empty($$SELECT m.identity FROM member m
	WHERE m.type IN ('table', 'view', 'function', 'procedure', 'schema')
	AND coalesce(obj_description(m.objid, m.catalog), '') = ''$$, 'every object has a comment');
SELECT isnt(obj_description(oid, 'pg_extension'), NULL, 'the extension too') FROM pg_extension WHERE extname = 'risky_migrations';

-- how they run
SELECT is_empty($$SELECT m.identity FROM member m JOIN pg_proc p ON p.oid = m.objid AND m.catalog = 'pg_proc' WHERE p.prosecdef$$,
	'no function is SECURITY DEFINER');
SELECT is_empty($$SELECT m.identity FROM member m JOIN pg_proc p ON p.oid = m.objid AND m.catalog = 'pg_proc'
	WHERE p.prokind = 'p' AND p.proconfig IS NOT NULL$$, 'no procedure has settings, which would forbid it to commit');
SELECT is_empty($$SELECT m.identity FROM member m JOIN pg_proc p ON p.oid = m.objid AND m.catalog = 'pg_proc'
	JOIN pg_language l ON l.oid = p.prolang WHERE l.lanname NOT IN ('c', 'sql')$$, 'C and SQL only: no other language is needed');
SELECT is_empty($$SELECT m.identity FROM member m JOIN pg_proc p ON p.oid = m.objid AND m.catalog = 'pg_proc'
	JOIN pg_language l ON l.oid = p.prolang WHERE l.lanname = 'sql' AND p.prosqlbody IS NULL$$,
	'bodies in SQL were parsed at CREATE EXTENSION: no search_path changes what they mean');
SELECT is_empty($$SELECT m.identity FROM member m JOIN pg_class c ON c.oid = m.objid AND m.catalog = 'pg_class'
	WHERE c.relkind = 'v' AND NOT coalesce('security_barrier=true' = ANY (c.reloptions), false)$$,
	'every view is a security barrier');
SELECT is_empty($$SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'risky_migrations'::regnamespace
	AND c.relpersistence <> 'p'$$, 'all state is WAL-logged');
SELECT is_empty($$SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'risky_migrations'::regnamespace AND c.relkind = 'r'
	AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid)$$, 'every table has an index');

-- settings
LOAD 'risky_migrations';
SELECT set_eq($$SELECT format('%s %s%s %s %s..%s', name, boot_val, unit, context, min_val, max_val) FROM pg_settings
	WHERE name ~ '^risky_migrations\.'$$, ARRAY[
	'risky_migrations.accept_publications off user ..',
	'risky_migrations.compress_wal on user ..',
	'risky_migrations.verify_beside on user ..',
	'risky_migrations.recreate_matviews off user ..',
	'risky_migrations.batch_pause 0ms user 0..2147483647',
	'risky_migrations.busy_rest 10 user 0..100',
	'risky_migrations.max_replica_lag 60000ms user 0..2147483647',
	'risky_migrations.max_replica_lag_bytes 262144kB user 0..2147483647',
	'risky_migrations.max_slot_retained_wal 10240MB user 0..2147483647',
	'risky_migrations.max_unarchived_wal 1024MB user 0..2147483647',
	'risky_migrations.throttle_query  user ..',
	'risky_migrations.throttle_query_timeout 5000ms user 1..2147483647',
	'risky_migrations.end_blockers_after 0ms user 0..2147483647',
	'risky_migrations.lock_retries 50 user 0..2147483647',
	'risky_migrations.lock_retry_max_delay 10000ms user 1..3600000',
	'risky_migrations.launcher_interval 60s sighup 1..86400',
	'risky_migrations.lock_timeout 250ms user 10..60000',
	'risky_migrations.max_row_lock_time 25ms user 1..60000',
	'risky_migrations.snapshot_timeout 3600000ms user 100..2147483647',
	'risky_migrations.workers 1 user 1..16'], 'the settings, their defaults and ranges');
SELECT is_empty($$SELECT name FROM pg_settings WHERE name ~ '^risky_migrations\.' AND coalesce(short_desc, '') = ''$$,
	'each of them is described');

-- gone without a trace, made again
DROP EXTENSION risky_migrations;
SELECT is((SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname IN ('tools', 'risky_migrations'))
	+ (SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname IN ('tools', 'risky_migrations'))
	+ (SELECT count(*) FROM pg_namespace WHERE nspname = 'risky_migrations'), 0::bigint, 'DROP EXTENSION leaves nothing');
CREATE EXTENSION risky_migrations SCHEMA tools;
SELECT is((SELECT count(*) FROM tools.rm_migrations), 0::bigint, 'and it can be created again');
SELECT * FROM finish();
ROLLBACK;
