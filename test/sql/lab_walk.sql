-- The lab can be taken from every migration to every other, and what it finds
-- there is always the same: the marks, the catalogs, the data.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;

-- what each target means, written down independently of the extension
CREATE TABLE meaning (target text, item text);
INSERT INTO meaning
SELECT t.target, i.item
FROM (VALUES ('0001'), ('0002'), ('0003'), ('0004'), ('0005')) t (target)
CROSS JOIN LATERAL (VALUES
	('large_record 1 id bigint not null default nextval(''large_record_id_seq''::regclass)'),
	('large_record 2 name character varying(100) not null'),
	('large_record index CREATE UNIQUE INDEX large_record_pkey ON large_record USING btree (id)'),
	('large_record constraint large_record_pkey PRIMARY KEY (id) valid'),
	('small_record 1 id bigint not null default nextval(''small_record_id_seq''::regclass)'),
	('small_record 2 name character varying(100) not null'),
	('small_record index CREATE UNIQUE INDEX small_record_pkey ON small_record USING btree (id)'),
	('small_record constraint small_record_pkey PRIMARY KEY (id) valid'),
	('small_record 3 created_at ' || CASE t.target WHEN '0002'
		THEN 'timestamp without time zone' ELSE 'character varying(50)' END || ' not null'),
	('large_record 3 created_at ' || CASE t.target WHEN '0002'
		THEN 'timestamp without time zone' ELSE 'character varying(50)' END || ' not null'),
	(CASE WHEN t.target >= '0003' THEN 'large_record 4 created_at_new timestamp without time zone'
		|| CASE t.target WHEN '0005' THEN ' not null' ELSE '' END END),
	-- BEFORE (2) INSERT (4) OR UPDATE (16) FOR EACH ROW (1), ENABLE ALWAYS, no WHEN, all columns
	(CASE WHEN t.target >= '0003' THEN 'large_record trigger ~rm_sync_N 23 A risky_migrations.sync whole row, always' END)
) i (item)
WHERE i.item IS NOT NULL;

-- the same of what is there
CREATE VIEW found AS
WITH rel AS (
	SELECT c.oid, c.relname FROM pg_class c
	WHERE c.relnamespace = 'public'::regnamespace AND c.relname IN ('small_record', 'large_record')
)
SELECT format('%s %s %s %s', r.relname, row_number() OVER (PARTITION BY r.oid ORDER BY a.attnum),
		a.attname, format_type(a.atttypid, a.atttypmod))
	|| CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
	|| coalesce(' default ' || pg_get_expr(d.adbin, d.adrelid), '') AS item
FROM rel r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = r.oid AND d.adnum = a.attnum
UNION ALL
SELECT format('%s trigger %s %s %s %s %s', r.relname, regexp_replace(t.tgname, '\d+$', 'N'),
	t.tgtype, t.tgenabled, t.tgfoid::regproc,
	CASE WHEN t.tgattr = '' AND t.tgqual IS NULL THEN 'whole row, always' ELSE 'partly' END)
FROM rel r JOIN pg_trigger t ON t.tgrelid = r.oid
UNION ALL
-- from PostgreSQL 18 on, NOT NULL is a constraint too; the columns tell it
SELECT format('%s constraint %s %s %s', r.relname, k.conname, pg_get_constraintdef(k.oid),
	CASE WHEN k.convalidated THEN 'valid' ELSE 'not valid' END)
FROM rel r JOIN pg_constraint k ON k.conrelid = r.oid AND k.contype <> 'n'
UNION ALL
SELECT format('%s index %s', r.relname, regexp_replace(pg_get_indexdef(i.indexrelid), 'public\.', '', 'g'))
FROM rel r JOIN pg_index i ON i.indrelid = r.oid AND i.indisvalid;

CREATE FUNCTION difference(target text) RETURNS text LANGUAGE sql AS $$
	SELECT coalesce(string_agg(line, E'\n' ORDER BY line), 'as it should be') FROM (
		(SELECT 'missing: ' || m.item FROM meaning m WHERE m.target = $1
			EXCEPT ALL SELECT 'missing: ' || f.item FROM found f)
		UNION ALL
		(SELECT 'too much: ' || f.item FROM found f
			EXCEPT ALL SELECT 'too much: ' || m.item FROM meaning m WHERE m.target = $1)
	) x (line)
$$;

-- all rows of both tables as they were seeded, in one string
CREATE FUNCTION seeded(small bigint, large bigint) RETURNS text LANGUAGE sql AS $$
	SELECT md5(string_agg(line, ';' ORDER BY line COLLATE "C")) FROM (
		SELECT format('s %s SmallRecord_%s 2024-01-01 10:%s', i, i,
			to_char((i - 1) * interval '1 s', 'MI:SS')) FROM generate_series(1, small) i
		UNION ALL
		SELECT format('l %s LargeRecord_%s 2024-01-01 10:%s', i, i,
			to_char((i - 1) * interval '1 s', 'MI:SS')) FROM generate_series(1, large) i
	) x (line)
$$;
CREATE FUNCTION present() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	what text := '%s';
	result text;
BEGIN
	IF (SELECT atttypid = 'timestamp'::regtype FROM pg_attribute
		WHERE attrelid = 'large_record'::regclass AND attname = 'created_at') THEN
		what := 'to_char(created_at, ''YYYY-MM-DD HH24:MI:SS'')';
	ELSE
		what := 'created_at';
	END IF;
	EXECUTE format('SELECT md5(string_agg(line, '';'' ORDER BY line COLLATE "C")) FROM (
		SELECT format(''s %%s %%s %%s'', id, name, %1$s) FROM small_record
		UNION ALL SELECT format(''l %%s %%s %%s'', id, name, %1$s) FROM large_record) x (line)', what)
		INTO result;
	RETURN result;
END
$$;
-- the shadow column: how many rows have a value, and how many the right one
CREATE FUNCTION filled() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	result text := '';
BEGIN
	IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'large_record'::regclass
		AND attname = 'created_at_new') THEN
		EXECUTE 'SELECT format(''%s filled, %s right'', count(created_at_new),
			count(*) FILTER (WHERE created_at_new = created_at::timestamp)) FROM large_record' INTO result;
	END IF;
	RETURN result;
END
$$;

-- arrived: fills tables that have just been made, and looks at everything
CREATE FUNCTION arrived(target text, OUT marks text, OUT stamped boolean, OUT catalogs text,
	OUT rows_checked bigint, OUT rows_wrong bigint, OUT same_data boolean, OUT shadow text)
LANGUAGE plpgsql AS $$
BEGIN
	SELECT string_agg(s.applied, '' ORDER BY s.number),
		bool_and(CASE s.applied WHEN '[X]' THEN s.applied_at <= clock_timestamp() AND s.duration >= '0'
			ELSE s.applied_at IS NULL AND s.duration IS NULL END)
		INTO marks, stamped FROM rm_showmigrations() s;
	IF target = 'zero' THEN
		catalogs := CASE WHEN EXISTS (SELECT FROM found)
			OR to_regclass('small_record_id_seq') IS NOT NULL
			OR to_regclass('large_record_id_seq') IS NOT NULL
			OR EXISTS (SELECT FROM risky_migrations.lab) THEN 'something is left' ELSE 'nothing' END;
		RETURN;
	END IF;
	catalogs := difference(target);
	-- the seed goes into the tables while they are new, so that it is the
	-- sync trigger that converts it where there is one
	IF NOT EXISTS (SELECT FROM large_record) THEN
		PERFORM rm_seed(300);
	END IF;
	SELECT c.rows_checked, c.rows_wrong INTO rows_checked, rows_wrong FROM rm_lab_check() c;
	same_data := present() = seeded(100, 300);
	shadow := filled();
END
$$;

-- One walk without a break that goes from every target to every target, the
-- same one included.
CREATE TABLE walk AS
SELECT x.n, x.target, lag(x.target) OVER (ORDER BY x.n) AS came_from
FROM regexp_split_to_table('zero zero 0001 0001 zero 0002 0002 zero 0003 0003 zero 0004 0004 zero '
	|| '0005 0005 0001 0002 0001 0003 0001 0004 0001 0005 0002 0003 0002 0004 0002 0005 0003 0004 '
	|| '0003 0005 0004 0005 zero', ' ') WITH ORDINALITY x (target, n);
SELECT count(DISTINCT (came_from, target)) AS pairs FROM walk WHERE came_from IS NOT NULL;

SELECT format('CALL rm_migrate(%L)', target), format('SELECT * FROM arrived(%L)', target)
FROM walk ORDER BY n
\gexec

-- nothing is left open, and every step that was begun was done
SELECT method, state, count(*) FROM rm_migrations GROUP BY 1, 2 ORDER BY 1, 2;
SELECT approach, step, direction, state, count(*) FROM risky_migrations.step_log
GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4;

DROP EXTENSION risky_migrations;
DROP VIEW found CASCADE;
DROP TABLE meaning, walk;
DROP FUNCTION difference, seeded, present, filled, arrived;
