-- What forbids to exchange a column: one object of each kind, all told at once,
-- and nothing told that can be carried over.
\set ON_ERROR_STOP 1
\set QUIET 1
SET client_min_messages = error;
CREATE EXTENSION IF NOT EXISTS pgtap;
CREATE EXTENSION risky_migrations;
CREATE ROLE rm_tap_owner;
CREATE ROLE rm_tap_other;
CREATE SCHEMA o AUTHORIZATION rm_tap_owner;
CREATE SCHEMA closed;
GRANT USAGE, CREATE ON SCHEMA o TO rm_tap_other;
GRANT CREATE ON DATABASE :"DBNAME" TO rm_tap_owner;
SELECT no_plan();

-- kind, name and reason of all that is in the way of the column c; a hint has to be there
CREATE FUNCTION public.obstacles(relation text) RETURNS SETOF text LANGUAGE sql AS $$
	SELECT concat_ws(' | ', b.kind, b.name, b.reason,
		CASE WHEN coalesce(b.hint, '') !~ '^[A-Z].*\.$' THEN 'has no hint' END)
	FROM pg_attribute a, risky_migrations.column_obstacles(a.attrelid, a.attnum) b
	WHERE a.attrelid = relation::regclass AND a.attname = 'c' $$;
CREATE FUNCTION public.kinds(relation text) RETURNS SETOF text LANGUAGE sql AS $$
	SELECT format('%s | %s', b.kind, b.name)
	FROM pg_attribute a, risky_migrations.column_obstacles(a.attrelid, a.attnum) b
	WHERE a.attrelid = relation::regclass AND a.attname = 'c' $$;

SET ROLE rm_tap_owner;

-----------------------------------------------------------------------
-- What is carried over is not in the way
-----------------------------------------------------------------------

CREATE TABLE o.plain (id int GENERATED ALWAYS AS IDENTITY, c serial, d int DEFAULT 1, PRIMARY KEY (id, c), UNIQUE (c), CHECK (c > 0));
CREATE TABLE o.child (c int REFERENCES o.plain (c));
CREATE INDEX ON o.plain ((c + 1)) WHERE c > 5;
CREATE STATISTICS o.plain_stat ON c, d FROM o.plain;
CREATE STATISTICS o.plain_expr ON (c + 1) FROM o.plain;
COMMENT ON COLUMN o.plain.c IS 'a column';
GRANT SELECT (c) ON o.plain TO rm_tap_other;
CREATE VIEW o.plain_view AS SELECT c, d FROM o.plain;
CREATE VIEW o.plain_whole AS SELECT p FROM o.plain p;
CREATE FUNCTION o.plain_function(p o.plain) RETURNS int LANGUAGE sql AS 'SELECT p.c';
CREATE FUNCTION o.plain_d() RETURNS SETOF int BEGIN ATOMIC SELECT d FROM o.plain; END;
CREATE MATERIALIZED VIEW o.plain_d_view AS SELECT d FROM o.plain;
SELECT is_empty($$SELECT obstacles('o.plain')$$, 'keys, constraints, defaults, indexes, statistics, views and functions beside it');
SELECT is_empty($$SELECT obstacles('o.child')$$, 'a foreign key');

-----------------------------------------------------------------------
-- What reads the column
-----------------------------------------------------------------------

CREATE TABLE o.read (id int, c int, d int);
CREATE VIEW o.view AS SELECT c FROM o.read;
CREATE MATERIALIZED VIEW o.matview AS SELECT c FROM o.read;
CREATE MATERIALIZED VIEW o.on_view AS SELECT count(*) FROM o.view;
CREATE MATERIALIZED VIEW o.on_matview AS SELECT count(*) FROM o.matview;
CREATE VIEW o.view_on_matview AS SELECT count(*) FROM o.matview;
CREATE TEMP VIEW temporary AS SELECT c FROM o.read;
CREATE FUNCTION o.body() RETURNS SETOF int BEGIN ATOMIC SELECT c FROM o.read; END;
CREATE PROCEDURE o.body_procedure() BEGIN ATOMIC UPDATE o.read SET c = 1; END;
CREATE FUNCTION o.body_on_view() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM o.view; END;
CREATE FUNCTION o.body_whole() RETURNS SETOF text BEGIN ATOMIC SELECT r::text FROM o.read r WHERE r.id > 0; END;
CREATE FUNCTION o.body_rows() RETURNS SETOF o.read BEGIN ATOMIC SELECT NULL::o.read; END;
CREATE FUNCTION o.string_rows() RETURNS SETOF o.read LANGUAGE sql AS 'SELECT * FROM o.read';
CREATE FUNCTION o.view_row(o.view) RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION o.view_rows() RETURNS SETOF o.view LANGUAGE sql AS 'SELECT * FROM o.view';
SELECT bag_eq($$SELECT obstacles('o.read')$$, ARRAY[
	'materialized view | o.matview | it stores what it has read',
	'materialized view | o.on_view | it stores what it has read',
	'materialized view | o.on_matview | it stores what it has read',
	'temporary view | pg_temp.temporary | it belongs to a session',
	'function | o.body() | its body refers to the column by number, or to a view that has to be made anew',
	'function | o.body_procedure() | its body refers to the column by number, or to a view that has to be made anew',
	'function | o.body_on_view() | its body refers to the column by number, or to a view that has to be made anew',
	'function | o.body_whole() | its body refers to the column by number, or to a view that has to be made anew',
	'function | o.body_rows() | its body is in SQL, and its arguments or its result are of the row type of the table',
	'function | o.view_row(o.view) | its arguments or its result are of the row type of a view that has to be made anew',
	'function | o.view_rows() | its arguments or its result are of the row type of a view that has to be made anew'
], 'materialized and temporary views, bodies in SQL, row types of views');

CREATE TABLE o.circle (c int);
CREATE VIEW o.circle_1 AS SELECT c FROM o.circle;
CREATE VIEW o.circle_2 AS SELECT c FROM o.circle_1;
CREATE OR REPLACE VIEW o.circle_1 AS SELECT t.c FROM o.circle t, o.circle_2;
SELECT bag_eq($$SELECT obstacles('o.circle')$$, ARRAY[
	'circular view | o.circle_1 | it stands on itself',
	'circular view | o.circle_2 | it stands on itself'], 'views that stand on themselves: it ends, and tells them');

-----------------------------------------------------------------------
-- By position
-----------------------------------------------------------------------

CREATE TABLE o."Pos.ition" (id int, k int);
CREATE TABLE o.beside (id int, c int);
CREATE VIEW o.generated_alias AS SELECT k FROM (SELECT c AS k FROM o.beside) b JOIN o."Pos.ition" p USING (k);
ALTER TABLE o."Pos.ition" RENAME k TO c;
CREATE FUNCTION o.rows() RETURNS SETOF o."Pos.ition" LANGUAGE sql AS 'SELECT * FROM o."Pos.ition"';
CREATE VIEW o.alias AS SELECT x.b FROM o."Pos.ition" x (a, b);
CREATE VIEW o.quoted_alias AS SELECT "x(".b FROM ONLY o."Pos.ition" "x(" (a, b) WHERE b > 0;
CREATE VIEW o.join_alias AS SELECT j.y FROM (o."Pos.ition" p JOIN o.beside b ON p.id = b.id) j (x, y, z);
CREATE VIEW o.function_rows AS SELECT r.c FROM o.rows() r;
CREATE VIEW o.row_constructor AS SELECT ROW(id, c)::o."Pos.ition" AS row FROM o."Pos.ition";
CREATE RULE rule AS ON DELETE TO o.beside DO ALSO UPDATE o.beside SET c = x.b FROM o."Pos.ition" x (a, b);
ALTER TABLE o.beside ENABLE ROW LEVEL SECURITY;
CREATE POLICY policy ON o.beside USING (EXISTS (SELECT FROM o."Pos.ition" x (a, b) WHERE b > 0));
CREATE VIEW o.by_name AS SELECT s.b, (r).c FROM (SELECT id, c FROM o."Pos.ition") s (a, b), (SELECT p AS r FROM o."Pos.ition" p) w;
CREATE RULE by_name AS ON INSERT TO o.beside DO ALSO INSERT INTO o."Pos.ition" AS p (id, c) VALUES (NEW.id, NEW.c);
SELECT bag_eq($$SELECT kinds('o."Pos.ition"')$$, ARRAY[
	'column alias list | o.alias', 'column alias list | o.quoted_alias', 'column alias list | o.join_alias',
	'column alias list | o.generated_alias', 'column alias list | o.function_rows', 'column alias list | rule on o.beside',
	'column alias list | policy on o.beside', 'row constructor | o.row_constructor'
], 'columns known by their position, also where nobody wrote it like that');

-- why: made again, they would read the column that has the old position
BEGIN;
SELECT pg_get_viewdef('o.alias') AS def \gset
DROP VIEW o.alias;
ALTER TABLE o."Pos.ition" ADD c_new int;
ALTER TABLE o."Pos.ition" RENAME c TO c_old;
ALTER TABLE o."Pos.ition" RENAME c_new TO c;
CREATE VIEW o.alias AS :def
SELECT '"_RETURN" on o.alias' IN (SELECT risky_migrations.column_left_behind('o."Pos.ition"'::regclass, 2::smallint)) AS told \gset
ROLLBACK;
SELECT ok(:'told'::boolean, 'and column_left_behind() tells');

-----------------------------------------------------------------------
-- The table itself
-----------------------------------------------------------------------

CREATE TABLE o.itself (c int, "G en" int GENERATED ALWAYS AS (c + 1) STORED, EXCLUDE (c WITH =), EXCLUDE ((c + 1) WITH =), EXCLUDE ("G en" WITH =));
SELECT bag_eq($$SELECT obstacles('o.itself')$$, ARRAY[
	'generated column | o.itself."G en" | it is generated from the column',
	'exclusion constraint | itself_c_excl on o.itself | its index cannot be built beside writers',
	'exclusion constraint | itself_expr_excl on o.itself | its index cannot be built beside writers'
], 'generated columns, exclusion constraints');

CREATE TYPE o.type AS (c int);
CREATE TABLE o.typed OF o.type;
SELECT bag_eq($$SELECT obstacles('o.typed')$$, ARRAY['typed table | o.type | its columns are those of the type'], 'a typed table');

CREATE TABLE o.parted (c int, d int) PARTITION BY RANGE (c, (d + 1));
CREATE TABLE o.part PARTITION OF o.parted DEFAULT;
CREATE TABLE o.parted_by_expr (c int) PARTITION BY RANGE ((c + 1));
SELECT bag_eq($$SELECT obstacles('o.parted')$$, ARRAY[
	'partition key | o.parted.c | its values say where a row is stored'], 'a column of a partition key');
SELECT bag_eq($$SELECT kinds('o.parted_by_expr')$$, ARRAY[
	'partition key | o.parted_by_expr.c'], 'an expression of a partition key');
SELECT bag_eq($$SELECT obstacles('o.part')$$, ARRAY['partition | o.part | it is a partition'], 'a partition');

CREATE TABLE o.tree (d int, c int, UNIQUE (d, c), PRIMARY KEY (c, d) DEFERRABLE) PARTITION BY RANGE (d);
CREATE TABLE o.tree_leaf (c int NOT NULL, d int NOT NULL, CONSTRAINT own EXCLUDE (c WITH =), UNIQUE (c));
ALTER TABLE o.tree ATTACH PARTITION o.tree_leaf FOR VALUES FROM (0) TO (10);
CREATE TABLE o.tree_mid PARTITION OF o.tree DEFAULT PARTITION BY LIST (d);
CREATE MATERIALIZED VIEW o.of_leaf AS SELECT c FROM o.tree_leaf;
CREATE TABLE o.to_tree (d int, c int, CONSTRAINT to_tree FOREIGN KEY (d, c) REFERENCES o.tree (d, c));
CREATE TABLE o.parted_ref (c int, CONSTRAINT parted_ref FOREIGN KEY (c) REFERENCES o.tree_leaf (c)) PARTITION BY LIST (c);
ALTER TABLE o.tree ADD e int, ADD CONSTRAINT itself FOREIGN KEY (d, e) REFERENCES o.tree (d, c);
ALTER TABLE o.tree_mid ADD CONSTRAINT sideways FOREIGN KEY (c) REFERENCES o.tree_leaf (c);
SELECT bag_eq($$SELECT obstacles('o.tree')$$, ARRAY[
	'deferrable constraint | tree_pkey on o.tree | while its index is built, rows would be refused that it lets pass until the end of a transaction',
	'exclusion constraint | own on o.tree_leaf | its index cannot be built beside writers',
	'foreign key | itself on o.tree | the partitioned table refers to itself',
	'foreign key | parted_ref on o.parted_ref | the table that refers is partitioned',
	'foreign key | sideways on o.tree_mid | it refers to a partition of the same table',
	'materialized view | o.of_leaf | it stores what it has read'], 'a partitioned table, and what its partitions have');

CREATE TABLE o.parent (c int);
CREATE TABLE o.heir () INHERITS (o.parent);
CREATE TABLE o.other_parent (c int);
CREATE TABLE o.far_heir () INHERITS (o.heir, o.other_parent);
CREATE MATERIALIZED VIEW o.of_far_heir AS SELECT c FROM o.far_heir;
CREATE TEMP TABLE session_heir () INHERITS (o.parent);
RESET ROLE;
CREATE FOREIGN DATA WRAPPER elsewhere;
CREATE SERVER elsewhere FOREIGN DATA WRAPPER elsewhere;
CREATE FOREIGN TABLE o.foreign_heir () INHERITS (o.parent) SERVER elsewhere;
ALTER FOREIGN TABLE o.foreign_heir OWNER TO rm_tap_owner;
ALTER TABLE o.heir ADD CONSTRAINT heir_c UNIQUE (c);
ALTER TABLE o.parent ADD CONSTRAINT to_heir FOREIGN KEY (c) REFERENCES o.heir (c);
SET ROLE rm_tap_owner;
SELECT bag_eq($$SELECT regexp_replace(obstacles('o.parent'), 'pg_temp\w*', 'pg_temp')$$, ARRAY[
	'child table | o.foreign_heir | it is no ordinary table',
	'child table | o.far_heir | it inherits the column from several tables',
	'child table | pg_temp.session_heir | it belongs to a session',
	'foreign key | to_heir on o.parent | it refers to another table of the same tree',
	'materialized view | o.of_far_heir | it stores what it has read'], 'a parent, and what its children have');
RESET ROLE;
ALTER TABLE o.far_heir OWNER TO rm_tap_other;
SET ROLE rm_tap_owner;
SELECT bag_has($$SELECT obstacles('o.parent')$$, $$VALUES ('child table | o.far_heir | it has another owner')$$, 'an heir of somebody else''s');
SELECT bag_eq($$SELECT obstacles('o.far_heir')$$, ARRAY['inherited column | o.heir | the column is inherited from it',
	'inherited column | o.other_parent | the column is inherited from it',
	'materialized view | o.of_far_heir | it stores what it has read'], 'an heir');

CREATE TABLE o.row (c int);
CREATE VIEW o.row_view AS SELECT c FROM o.row;
CREATE TABLE o.of_row (one o.row, many o.row[], of_view o.row_view);
CREATE TYPE o.with_row AS (one o.row);
CREATE DOMAIN o.domain AS o.row;
CREATE DOMAIN o.domain_of_view AS o.row_view[];
CREATE TYPE o.range AS RANGE (subtype = o.row);
CREATE TABLE o.with_check (c int, CONSTRAINT checked CHECK ((ROW(c)::o.row_view).c > 0), d int DEFAULT (ROW(1)::o.row_view).c);
CREATE TABLE o.with_field (r o.row DEFAULT NULL, CHECK ((r).c > 0));
CREATE SEQUENCE o.owned OWNED BY o.row_view.c;
SELECT bag_eq($$SELECT obstacles('o.row')$$, ARRAY[
	'row type | o.of_row.one | it is of the row type of the table', 'row type | o.of_row.many | it is of the row type of the table',
	'row type | o.with_field.r | it is of the row type of the table', 'row type | o.with_row.one | it is of the row type of the table',
	'row type | o.domain | it is of the row type of the table', 'row type | o.range | it is of the row type of the table',
	'row type | o.of_row.of_view | it refers to view o.row_view, which has to be made anew',
	'row type | o.domain_of_view | it refers to view o.row_view, which has to be made anew',
	'row type | for o.with_check.d | it refers to view o.row_view, which has to be made anew',
	'row type | checked on o.with_check | it refers to view o.row_view, which has to be made anew',
	'other object | o.owned | it refers to view o.row_view, which has to be made anew'
], 'what is of the row type of the table or of a view; a sequence that a view owns');

-----------------------------------------------------------------------
-- Publications
-----------------------------------------------------------------------

CREATE TABLE o.pub (id int PRIMARY KEY, c int, d int);
CREATE TABLE o.pub_full (c int);
ALTER TABLE o.pub_full REPLICA IDENTITY FULL;
CREATE UNLOGGED TABLE o.unlogged (c int);
CREATE PUBLICATION "Listed" FOR TABLE o.pub (id, c);
CREATE PUBLICATION harmless FOR TABLE o.pub (id, d) WHERE (d > 0 AND id > 0);
CREATE PUBLICATION filtered FOR TABLE o.pub (id, d) WHERE (c > 0) WITH (publish = 'insert');
CREATE PUBLICATION listed_beside FOR TABLE o.pub (c) WHERE (d > 0) WITH (publish = 'insert');
CREATE PUBLICATION whole FOR TABLE o.pub WHERE (id > 0);
CREATE PUBLICATION nobody;
RESET ROLE;
CREATE PUBLICATION of_schema FOR TABLES IN SCHEMA o WITH (publish = 'insert');
CREATE PUBLICATION of_all FOR ALL TABLES;
SET ROLE rm_tap_owner;
SELECT bag_eq($$SELECT obstacles('o.pub')$$, ARRAY[
	'publication | whole | it publishes all columns, and the subscriber does not have the new one',
	'publication | of_schema | it publishes all columns, and the subscriber does not have the new one',
	'publication | of_all | it publishes all columns, and the subscriber does not have the new one'
], 'publications of one''s own: a list of columns and a condition are carried over');
RESET ROLE;
ALTER PUBLICATION "Listed" OWNER TO rm_tap_other;
ALTER PUBLICATION filtered OWNER TO rm_tap_other;
ALTER PUBLICATION listed_beside OWNER TO rm_tap_other;
SET ROLE rm_tap_owner;
SELECT bag_eq($$SELECT obstacles('o.pub')$$, ARRAY[
	'publication column list | "Listed" | its list of columns has the column, and role rm_tap_owner is not an owner of it',
	'publication column list | listed_beside | its list of columns has the column, and role rm_tap_owner is not an owner of it',
	'publication row filter | filtered | its condition uses the column, and role rm_tap_owner is not an owner of it',
	'publication | whole | it publishes all columns, and the subscriber does not have the new one',
	'publication | of_schema | it publishes all columns, and the subscriber does not have the new one',
	'publication | of_all | it publishes all columns, and the subscriber does not have the new one'
], 'of others: list of columns, condition, all columns, of a schema, of all tables');
SELECT bag_eq($$SELECT obstacles('o.pub_full')$$, ARRAY[
	'publication | of_schema | it publishes all columns, and the subscriber does not have the new one',
	'publication | of_schema | it publishes the table, whose replica identity is FULL',
	'publication | of_all | it publishes all columns, and the subscriber does not have the new one',
	'publication | of_all | it publishes the table, whose replica identity is FULL'
], 'replica identity');
SELECT is_empty($$SELECT obstacles('o.unlogged')$$, 'an unlogged table is not published');
RESET ROLE;
DROP PUBLICATION of_schema, of_all;

-----------------------------------------------------------------------
-- Casts that nobody wrote
-----------------------------------------------------------------------

SET ROLE rm_tap_owner;
CREATE DOMAIN o.whole AS int;
CREATE DOMAIN o.wide AS bigint;
CREATE DOMAIN o.wider AS o.wide;
CREATE TABLE o.casts (id int, c o.whole, s smallint);
CREATE TABLE o.casts_heir (t text, s smallint, c o.whole, id int);
ALTER TABLE o.casts_heir INHERIT o.casts;
CREATE PUBLICATION small FOR TABLE ONLY o.casts WHERE (s & 4 = 4) WITH (publish = 'insert');
CREATE FUNCTION o.note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE FUNCTION o.takes(int) RETURNS int LANGUAGE sql AS 'SELECT $1';
CREATE VIEW o.compared AS SELECT id FROM o.casts WHERE c > 5;
CREATE VIEW o.passed AS SELECT c, id FROM o.casts;
CREATE VIEW o.passed_on AS SELECT id FROM o.passed WHERE c > 5;
CREATE VIEW o.widened AS SELECT id FROM o.casts WHERE c::bigint > 5 AND id > 5;
CREATE VIEW o.of_small AS SELECT o.takes(s) FROM o.casts WHERE s > 5;
CREATE VIEW o.of_heir AS SELECT t FROM o.casts_heir WHERE o.takes(s) > 5;
CREATE TRIGGER compares AFTER UPDATE OF c ON o.casts FOR EACH ROW WHEN (OLD.c <> NEW.c) EXECUTE FUNCTION o.note();
CREATE TRIGGER does_not AFTER UPDATE OF c ON o.casts FOR EACH ROW WHEN (NEW.c IS NOT NULL) EXECUTE FUNCTION o.note();
CREATE POLICY compares ON o.casts USING (c > 5);
CREATE RULE compares AS ON DELETE TO o.casts WHERE OLD.c = 5 DO INSTEAD NOTHING;
CREATE FUNCTION pg_temp.coercions(attnum int, type regtype) RETURNS SETOF text LANGUAGE sql AS $$
	SELECT concat_ws(' | ', kind, name, reason) FROM risky_migrations.column_coercions('o.casts'::regclass, attnum::smallint, type) $$;
SELECT bag_eq($$SELECT pg_temp.coercions(2, 'bigint')$$, ARRAY[
	'implicit cast | o.compared | it has the column cast to integer, and values of type bigint need not fit',
	'implicit cast | o.passed_on | it has the column cast to integer, and values of type bigint need not fit',
	'implicit cast | compares on o.casts | it has the column cast to integer, and values of type bigint need not fit',
	'implicit cast | compares on o.casts | it has the column cast to integer, and values of type bigint need not fit',
	'implicit cast | compares on o.casts | it has the column cast to integer, and values of type bigint need not fit'
], 'a domain over int that becomes a bigint');
SELECT is(count(*), 5::bigint, 'or text') FROM pg_temp.coercions(2, 'text');
SELECT is(count(*), 5::bigint, 'or a domain over a domain over it') FROM pg_temp.coercions(2, 'o.wider');
SELECT is_empty($$SELECT pg_temp.coercions(2, 'integer')$$, 'its base type fits');
SELECT is_empty($$SELECT pg_temp.coercions(2, 'smallint')$$, 'and so does a smaller one');
SELECT set_eq($$SELECT pg_temp.coercions(3, 'bigint')$$, ARRAY[
	'implicit cast | o.of_small | it has the column cast to integer, and values of type bigint need not fit',
	'implicit cast | o.of_heir | it has the column cast to integer, and values of type bigint need not fit',
	'implicit cast | o.casts in publication small | it has the column cast to integer, and values of type bigint need not fit'],
	'an argument of a function; a view on a child; the condition of a publication');
RESET ROLE;

-----------------------------------------------------------------------
-- What the caller could not make again
-----------------------------------------------------------------------

SET ROLE rm_tap_owner;
CREATE TABLE o.owned_table (c int);
GRANT SELECT, REFERENCES ON o.owned_table TO rm_tap_other;
CREATE VIEW o.mine AS SELECT c FROM o.owned_table;
CREATE VIEW o.given AS SELECT c FROM o.owned_table;
CREATE VIEW o.given_column AS SELECT c FROM o.owned_table;
CREATE VIEW o.member AS SELECT c FROM o.owned_table;
CREATE VIEW o.without_trigger AS SELECT c FROM o.owned_table;
CREATE FUNCTION o.react() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER instead INSTEAD OF DELETE ON o.without_trigger FOR EACH ROW EXECUTE FUNCTION o.react();
REVOKE TRIGGER ON o.without_trigger FROM rm_tap_owner;
GRANT SELECT ON o.given TO rm_tap_other WITH GRANT OPTION;
GRANT SELECT (c) ON o.given_column TO rm_tap_other WITH GRANT OPTION;
SET ROLE rm_tap_other;
GRANT SELECT ON o.given TO PUBLIC;
GRANT SELECT (c) ON o.given_column TO PUBLIC;
CREATE VIEW o.others AS SELECT c FROM o.mine;
CREATE TABLE o.others_table (c int);
CREATE RULE others_rule AS ON DELETE TO o.others_table DO ALSO SELECT c FROM o.owned_table;
CREATE FUNCTION o.others_react() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
SET ROLE rm_tap_owner;
CREATE TRIGGER no_execute AFTER UPDATE OF c ON o.owned_table FOR EACH ROW EXECUTE FUNCTION o.others_react();
RESET ROLE;
CREATE VIEW closed.elsewhere AS SELECT c FROM o.owned_table;
ALTER VIEW closed.elsewhere OWNER TO rm_tap_owner;
REVOKE EXECUTE ON FUNCTION o.others_react() FROM PUBLIC;
CREATE EXTENSION hstore;
ALTER EXTENSION hstore ADD VIEW o.member;
GRANT USAGE ON SCHEMA closed TO rm_tap_owner;
SELECT bag_eq($$SELECT kinds('o.owned_table')$$, ARRAY[
	'passed on privileges | o.given', 'passed on privileges | o.given_column', 'extension | o.member'
], 'for a superuser');
SET ROLE rm_tap_owner;
SELECT bag_eq($$SELECT obstacles('o.owned_table')$$, ARRAY[
	'passed on privileges | o.given | role rm_tap_other, not its owner, has granted some',
	'passed on privileges | o.given_column | role rm_tap_other, not its owner, has granted some',
	'extension | o.member | it belongs to extension hstore',
	'owner | o.others | role rm_tap_owner cannot act as its owner rm_tap_other',
	'owner | o.others_table | role rm_tap_owner cannot act as its owner rm_tap_other',
	'privilege | closed.elsewhere | role rm_tap_owner may not create objects in schema closed',
	'privilege | no_execute on o.owned_table | role rm_tap_owner may not execute its function, or has no privilege TRIGGER',
	'privilege | instead on o.without_trigger | role rm_tap_owner may not execute its function, or has no privilege TRIGGER'
], 'for an owner');
RESET ROLE;
ALTER EXTENSION hstore DROP VIEW o.member;

-----------------------------------------------------------------------
-- Labels, and what nobody has thought of
-----------------------------------------------------------------------

CREATE TABLE o.labelled (c int, d int);
CREATE VIEW o.labelled_view AS SELECT c AS "C" FROM o.labelled;
BEGIN;
-- no provider is loaded: as if one had been
SET LOCAL allow_system_table_mods = on;
INSERT INTO pg_seclabel VALUES ('o.labelled'::regclass, 'pg_class'::regclass, 1, 'se linux', 'x'),
	('o.labelled'::regclass, 'pg_class'::regclass, 2, 'other', 'x'),
	('o.labelled_view'::regclass, 'pg_class'::regclass, 0, 'se linux', 'it''s'),
	('o.labelled_view'::regclass, 'pg_class'::regclass, 1, 'other', 'x');
SELECT array(SELECT obstacles('o.labelled')) AS obstacles, array(SELECT s
	FROM risky_migrations.column_objects('o.labelled'::regclass, ARRAY[1::smallint]) o, unnest(o.make_sql) s WHERE s ~ 'LABEL') AS made \gset
ROLLBACK;
SELECT is(:'obstacles'::text[], ARRAY['security label | o.labelled.c | provider "se linux" has labelled it'], 'a label on the column');
SELECT is(:'made'::text[], ARRAY['SECURITY LABEL FOR "se linux" ON VIEW o.labelled_view IS ''it''''s''',
	'SECURITY LABEL FOR other ON COLUMN o.labelled_view."C" IS ''x'''], 'labels on a view are carried over');
BEGIN;
SET LOCAL allow_system_table_mods = on;
INSERT INTO pg_depend SELECT 'pg_collation'::regclass, (SELECT min(oid) FROM pg_collation WHERE collname = 'C'), 0,
	'pg_class'::regclass, 'o.labelled'::regclass, 1, 'n';
SELECT array(SELECT obstacles('o.labelled')) AS obstacles \gset
ROLLBACK;
SELECT is(:'obstacles'::text[], ARRAY['other object | pg_catalog."C" | it refers to the column'], 'any object of a kind that nobody knows');
SELECT * FROM finish();
DROP EXTENSION risky_migrations CASCADE;
DROP OWNED BY rm_tap_owner, rm_tap_other CASCADE;
DROP ROLE rm_tap_owner, rm_tap_other;
