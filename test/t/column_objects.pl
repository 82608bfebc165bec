# What hangs on a column: views, rules, triggers and policies are dropped and
# made again with all that they had.  The measure is pg_dump: the same before
# and after, also where the columns were exchanged in between.

use strict;
use warnings;

use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = LabNode->new('column_objects');
$node->init;
$node->append_conf('postgresql.conf', "client_min_messages = warning\n");
$node->start;
my $superuser = $node->safe_psql('postgres', 'SELECT current_user');

# All statements in one session of that role; dies if one fails.
sub as
{
	my ($role, $query) = @_;
	return $node->safe_psql('postgres', $query, extra_params => [ '-U', $role ]);
}

# The entries of a dump, sorted: their order follows the objects' OIDs where
# names do not decide.
sub dump_schema
{
	my ($text) = run_command([ 'pg_dump', '-s', '-d', $node->connstr('postgres'), '-U', $superuser ]);
	$text =~ s/^\\(un)?restrict .*\n//mg;
	$text =~ /CREATE VIEW app.v4/ or die 'the dump is empty';
	return [ sort split /\n\n+/, $text ];
}

# Without the table itself, whose columns have changed places, and without the
# types that pg_dump gives the columns of a view that it makes in two goes.
sub without_types
{
	return [ map { s/NULL::(character varying\(50\)|timestamp without time zone) AS c/NULL AS c/r }
		  grep { !/^CREATE TABLE / } @{ $_[0] } ];
}

sub same_dump
{
	my ($got, $expected, $name) = @_;
	my ($g, $e) = (join("\n\n", @$got), join("\n\n", @$expected));
	return if is($g eq $e ? 'same' : 'different', 'same', $name);
	my %seen = map { $_ => 1 } @$expected;
	my %now = map { $_ => 1 } @$got;
	diag("lost:\n" . join("\n\n", grep { !$now{$_} } @$expected));
	diag("new:\n" . join("\n\n", grep { !$seen{$_} } @$got));
}

# Drops what hangs on a column and makes it again, as the swap does.
sub exchange
{
	my ($role, $table, $column, $between, $settings) = @_;
	as($role, ($settings // '') . qq{
BEGIN;
CREATE TEMP TABLE hanging ON COMMIT DROP AS
SELECT o.* FROM pg_attribute a, risky_migrations.column_objects(a.attrelid, ARRAY[a.attnum]) o
WHERE a.attrelid = '$table'::regclass AND a.attname = \$name\$$column\$name\$;
SELECT drop_sql FROM hanging ORDER BY ord \\gexec
$between
SELECT m.sql FROM hanging h, unnest(h.make_sql) WITH ORDINALITY m (sql, n) ORDER BY h.ord DESC, m.n \\gexec
COMMIT;
});
}

my $long = 'x' x 63;

as($superuser, q{
CREATE EXTENSION risky_migrations;
CREATE ROLE app LOGIN;
CREATE ROLE keeper NOLOGIN;
CREATE ROLE reader NOLOGIN;
CREATE ROLE "Odd ""Role" NOLOGIN;
GRANT keeper TO app;
CREATE SCHEMA app AUTHORIZATION app;
CREATE SCHEMA "Other Schema" AUTHORIZATION app;
GRANT USAGE, CREATE ON SCHEMA app, "Other Schema" TO keeper;
});

as('app', qq{
SET search_path = app;
CREATE TABLE t (id int PRIMARY KEY, c varchar(50) UNIQUE, d int, "Mixed ""Case" text);
CREATE TABLE u (id int, note text, moment timestamptz);
CREATE TABLE log (id int, what text);
CREATE FUNCTION react() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';

-- views on the column, on such views, and on both
CREATE VIEW v1 WITH (security_barrier) AS SELECT id, c, d FROM t;
CREATE VIEW v2 AS SELECT id FROM v1;
CREATE VIEW v3 AS SELECT v1.c, v2.id FROM v1 JOIN v2 USING (id);
CREATE VIEW v4 AS SELECT v3.c AS first, v1.c AS second FROM v3, v1, v2;
CREATE VIEW "Other Schema"."$long" AS SELECT c AS "A ""B", id AS renamed, "Mixed ""Case" FROM t;
ALTER VIEW "Other Schema"."$long" RENAME COLUMN renamed TO "$long";
CREATE VIEW "Other Schema".v1 AS SELECT "$long" FROM "Other Schema"."$long";
CREATE VIEW checked AS SELECT id, c FROM t WHERE d > 0 WITH CASCADED CHECK OPTION;
CREATE VIEW checked_locally AS SELECT id, c FROM checked WITH LOCAL CHECK OPTION;
CREATE VIEW invoker WITH (security_invoker = true, security_barrier = false) AS SELECT c FROM t;
CREATE RECURSIVE VIEW recursive (id, c, depth) AS
	SELECT id, c, 1 FROM t UNION ALL SELECT t.id, r.c, r.depth + 1 FROM recursive r JOIN t ON t.d = r.id;
CREATE VIEW grouped AS SELECT id, c FROM t GROUP BY id;
CREATE VIEW whole_row AS SELECT id, t AS row FROM t;
CREATE VIEW whole_text AS SELECT t.*::text AS text FROM t;
CREATE VIEW no_columns AS SELECT FROM t WHERE c IS NULL;
CREATE VIEW of_row_type AS SELECT NULL::v1 AS one, NULL::v1[] AS many;
CREATE VIEW constants AS SELECT c, timestamptz '2024-02-03 04:05:06+00' AS moment, date '2024-02-03' AS day,
	interval '-1 days +02:03:04' AS span, 0.1::float8 + 0.2::float8 AS sum, E'back\\\\slash ''quote''' AS text FROM t;
CREATE VIEW joined AS SELECT j.c, j.note FROM (t JOIN u USING (id)) j;
CREATE VIEW beside AS SELECT id, d FROM t;
CREATE VIEW on_beside AS SELECT count(*) FROM beside, t;
SET ROLE keeper;
CREATE VIEW keepers AS SELECT id FROM v1;
RESET ROLE;
ALTER VIEW v2 OWNER TO keeper;

-- what views have
GRANT SELECT, UPDATE ON v1 TO reader WITH GRANT OPTION;
GRANT INSERT ON v1 TO reader, "Odd ""Role";
GRANT SELECT ON v1 TO PUBLIC;
GRANT SELECT (c), UPDATE (c) ON v3 TO reader;
GRANT INSERT (id) ON v3 TO "Odd ""Role" WITH GRANT OPTION;
REVOKE ALL ON checked_locally FROM app;
REVOKE DELETE, TRUNCATE ON checked FROM app;
SET ROLE keeper;
GRANT SELECT ON v2 TO app;
RESET ROLE;
GRANT USAGE ON TYPE v3 TO reader;
REVOKE USAGE ON TYPE v3 FROM PUBLIC;
COMMENT ON VIEW v1 IS 'it''s a \\view';
COMMENT ON COLUMN v1.c IS 'a column';
COMMENT ON COLUMN "Other Schema"."$long"."$long" IS 'a "long" one';
COMMENT ON TYPE v1 IS 'a row type';
COMMENT ON RULE "_RETURN" ON v1 IS 'the rule that makes it a view';
CREATE SEQUENCE counter;
ALTER VIEW v1 ALTER d SET DEFAULT nextval('counter');
ALTER VIEW "Other Schema"."$long" ALTER "$long" SET DEFAULT 7;

-- rules and triggers on views; one rule uses a view that stands on its own
CREATE RULE to_higher AS ON INSERT TO v1 DO INSTEAD INSERT INTO log SELECT id, 'v3' FROM v3;
CREATE RULE "Odd ""Rule" AS ON DELETE TO v1 DO INSTEAD (DELETE FROM t WHERE t.id = OLD.id; INSERT INTO log VALUES (OLD.id, OLD.c::text));
COMMENT ON RULE to_higher ON v1 IS 'a rule';
CREATE TRIGGER instead INSTEAD OF INSERT OR UPDATE ON v3 FOR EACH ROW EXECUTE FUNCTION react('a', 'b''c');
CREATE TRIGGER after_all AFTER DELETE ON v3 FOR EACH STATEMENT EXECUTE FUNCTION react();
COMMENT ON TRIGGER instead ON v3 IS 'instead of';

-- rules on tables
CREATE RULE on_change AS ON UPDATE TO t WHERE OLD.c IS DISTINCT FROM NEW.c DO ALSO INSERT INTO log VALUES (NEW.id, NEW.c::text);
CREATE RULE on_action AS ON INSERT TO t DO ALSO INSERT INTO log (what) VALUES (NEW.c::text);
CREATE RULE disabled AS ON INSERT TO t DO ALSO INSERT INTO log (what) VALUES (NEW.c::text);
CREATE RULE elsewhere AS ON INSERT TO u DO ALSO UPDATE t SET c = DEFAULT WHERE t.id = NEW.id;
CREATE RULE through_view AS ON DELETE TO u DO ALSO INSERT INTO log SELECT id FROM v2;
CREATE RULE by_constraint AS ON UPDATE TO u DO ALSO INSERT INTO t (id) VALUES (NEW.id) ON CONFLICT ON CONSTRAINT t_c_key DO NOTHING;
CREATE RULE by_other_constraint AS ON UPDATE TO u DO ALSO INSERT INTO t (id) VALUES (NEW.id) ON CONFLICT ON CONSTRAINT t_pkey DO NOTHING;
CREATE RULE beside AS ON DELETE TO t DO ALSO INSERT INTO log VALUES (OLD.id);
ALTER TABLE t DISABLE RULE disabled;
ALTER TABLE t ENABLE ALWAYS RULE on_action;
ALTER TABLE u ENABLE REPLICA RULE through_view;
COMMENT ON RULE on_change ON t IS 'another rule';

-- triggers of each state
CREATE TRIGGER listed AFTER UPDATE OF d, c ON t FOR EACH ROW EXECUTE FUNCTION react();
CREATE TRIGGER conditional BEFORE INSERT OR UPDATE ON t FOR EACH ROW WHEN (NEW.c IS NULL) EXECUTE FUNCTION react();
CREATE TRIGGER "Disabled ""one" AFTER UPDATE OF c ON t FOR EACH STATEMENT EXECUTE FUNCTION react();
CREATE TRIGGER replica AFTER UPDATE OF c ON t FOR EACH ROW EXECUTE FUNCTION react('x');
CREATE TRIGGER always AFTER UPDATE OF c ON t FOR EACH ROW EXECUTE FUNCTION react();
CREATE TRIGGER transition AFTER UPDATE ON t REFERENCING OLD TABLE AS before NEW TABLE AS "After"
	FOR EACH ROW WHEN (OLD.c IS DISTINCT FROM NEW.c) EXECUTE FUNCTION react();
CREATE CONSTRAINT TRIGGER deferred AFTER UPDATE OF c ON t FROM u DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW WHEN (NEW.c IS NULL) EXECUTE FUNCTION react();
CREATE TRIGGER beside AFTER UPDATE OF d ON t FOR EACH ROW EXECUTE FUNCTION react();
ALTER TABLE t DISABLE TRIGGER "Disabled ""one", ENABLE REPLICA TRIGGER replica, ENABLE ALWAYS TRIGGER always;
COMMENT ON TRIGGER listed ON t IS 'fires';
COMMENT ON CONSTRAINT deferred ON t IS 'a constraint';

-- policies here and elsewhere
ALTER TABLE t ENABLE ROW LEVEL SECURITY;
ALTER TABLE u ENABLE ROW LEVEL SECURITY;
CREATE POLICY reading ON t FOR SELECT TO reader, "Odd ""Role" USING (c IS NOT NULL);
CREATE POLICY "Odd ""Policy" ON t AS RESTRICTIVE FOR UPDATE TO reader, "Odd ""Role" USING (d > 0) WITH CHECK (c IS NOT NULL);
CREATE POLICY adding ON t FOR INSERT WITH CHECK (c IS NOT NULL);
CREATE POLICY deleting ON t FOR DELETE USING (c IS NULL);
CREATE POLICY elsewhere ON u USING (EXISTS (SELECT FROM t WHERE t.id = u.id AND t.c IS NOT NULL)) WITH CHECK (id IN (SELECT id FROM v2));
CREATE POLICY through_view ON u FOR SELECT USING (id IN (SELECT id FROM v2));
CREATE POLICY beside ON t USING (d > 0);
COMMENT ON POLICY elsewhere ON u IS 'a policy';
});
as($superuser, 'ALTER TRIGGER listed ON app.t DEPENDS ON EXTENSION plpgsql');

my $table = 'app.t';
my $c = "(SELECT attnum FROM pg_attribute WHERE attrelid = '$table'::regclass AND attname = 'c')";
my $original = dump_schema();

is(as('app', "SELECT * FROM risky_migrations.column_obstacles('$table'::regclass, $c)"), '', 'nothing is in the way');
is( as('app', "SELECT kind || ' ' || name FROM risky_migrations.column_objects('$table'::regclass, ARRAY[$c]) ORDER BY kind <> 'view', kind, name"),
	join("\n", (map { "view $_" } sort qw(app.v1 app.v2 app.v3 app.v4 app.checked app.checked_locally app.invoker
			app.recursive app.grouped app.whole_row app.whole_text app.no_columns app.of_row_type app.constants app.joined app.keepers),
			'"Other Schema".v1', qq{"Other Schema".$long}),
		(map { "policy $_" } sort 'reading on app.t', '"Odd ""Policy" on app.t', 'adding on app.t', 'deleting on app.t',
			'elsewhere on app.u', 'through_view on app.u'),
		(map { "rule $_" } sort 'to_higher on app.v1', '"Odd ""Rule" on app.v1', 'on_change on app.t', 'on_action on app.t',
			'disabled on app.t', 'elsewhere on app.u', 'through_view on app.u', 'by_constraint on app.u'),
		(map { "trigger $_" } sort 'instead on app.v3', 'after_all on app.v3', 'listed on app.t', 'conditional on app.t',
			'"Disabled ""one" on app.t', 'replica on app.t', 'always on app.t', 'transition on app.t', 'deferred on app.t')),
	'what hangs on the column, and nothing else');
is( as('app', "SELECT string_agg(r::regclass::text, ' ' ORDER BY r::regclass::text COLLATE \"C\")
		FROM risky_migrations.column_relations('$table'::regclass, ARRAY[$c]) r WHERE r::regclass::text ~ '^[uv]'"),
	'u v1 v2 v3 v4', 'what the exchange locks besides the table');

# nothing changed in between
exchange('app', $table, 'c', '');
same_dump(dump_schema(), $original, 'an owner without superuser drops and makes all of it');
is(as('app', q{SELECT count(*) FROM pg_class WHERE relname IN ('v4', 'keepers') AND relacl IS NULL}),
	2, 'no privileges stay no privileges');
exchange($superuser, $table, 'c', '');
same_dump(dump_schema(), $original, 'a superuser does too');
exchange('app', $table, 'c', '', q{
SET search_path = app, "Other Schema"; SET DateStyle = 'SQL, DMY'; SET IntervalStyle = sql_standard;
SET TimeZone = 'Europe/Berlin'; SET extra_float_digits = -5; SET standard_conforming_strings = off;
SET quote_all_identifiers = on; SET backslash_quote = off; SET escape_string_warning = off;});
same_dump(dump_schema(), $original, 'the settings of the session do not matter');
is( as('app', q{SELECT typacl FROM pg_type WHERE oid = 'app.v3'::regtype}),
	'{app=U/app,reader=U/app}', 'the privileges of a row type, which pg_dump does not show');
is( as('app', q{SELECT obj_description('app.v1'::regtype, 'pg_type')}),
	'a row type', 'nor the comment of one');

# default privileges that came later give nothing to nobody
as($superuser, q{
ALTER DEFAULT PRIVILEGES FOR ROLE app GRANT ALL ON TABLES TO reader;
ALTER DEFAULT PRIVILEGES FOR ROLE app IN SCHEMA app GRANT SELECT ON TABLES TO PUBLIC;
ALTER DEFAULT PRIVILEGES FOR ROLE app REVOKE INSERT ON TABLES FROM app;
});
my $with_defaults = dump_schema();
exchange('app', $table, 'c', '');
same_dump(dump_schema(), $with_defaults, 'default privileges do not get in');
as($superuser, q{
ALTER DEFAULT PRIVILEGES FOR ROLE app REVOKE ALL ON TABLES FROM reader;
ALTER DEFAULT PRIVILEGES FOR ROLE app IN SCHEMA app REVOKE SELECT ON TABLES FROM PUBLIC;
ALTER DEFAULT PRIVILEGES FOR ROLE app GRANT INSERT ON TABLES TO app;
});

# the columns exchanged, there and back
as('app', "ALTER TABLE $table ADD c_new timestamp");
exchange('app', $table, 'c', "ALTER TABLE $table RENAME c TO c_old; ALTER TABLE $table RENAME c_new TO c;
	ALTER TABLE $table DROP CONSTRAINT t_c_key; ALTER TABLE $table ADD UNIQUE (c);");
same_dump(without_types(dump_schema()), without_types($original), 'the same definitions after the exchange');
is( as('app', q{SELECT string_agg(format('%s.%s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod)), ', ' ORDER BY 1)
	FROM (SELECT * FROM pg_attribute WHERE attrelid IN ('app.v1'::regclass, 'app.v4'::regclass, 'app.recursive'::regclass)
		AND attname IN ('c', 'first', 'second') ORDER BY attrelid::regclass::text, attname) a}),
	join(', ', map { "$_ timestamp without time zone" } 'recursive.c', 'v1.c', 'v4.first', 'v4.second'), 'views have the new type');
is( as('app', "SELECT * FROM risky_migrations.column_left_behind('$table'::regclass, 2::smallint)"), '', 'nobody is left behind');
is( as('app', "SELECT count(*) > 20 FROM risky_migrations.column_left_behind('$table'::regclass, $c)"), 't', 'all have moved');
exchange('app', $table, 'c', "ALTER TABLE $table RENAME c TO c_new; ALTER TABLE $table RENAME c_old TO c;
	ALTER TABLE $table DROP CONSTRAINT t_c_key; ALTER TABLE $table ADD UNIQUE (c);");
as('app', "ALTER TABLE $table DROP c_new");
same_dump(dump_schema(), $original, 'and back: no difference at all');

# the sync trigger of a migration is not among them
as('app', "ALTER TABLE $table DISABLE ROW LEVEL SECURITY; DROP RULE on_action ON $table; DROP TRIGGER always ON $table; DROP TRIGGER replica ON $table");
as('app', "CALL rm_add_column('$table', 'c', 'text', 'c::text')");
is( as('app', "SELECT count(*) FROM risky_migrations.column_objects('$table'::regclass, ARRAY[$c]) WHERE name ~ 'rm_sync'"),
	0, 'the sync trigger is not touched');
is(as('app', "SELECT * FROM risky_migrations.column_obstacles('$table'::regclass, $c)"), '', 'nor is it in the way');
as('app', 'CALL rm_rollback()');

# names that need quoting everywhere
my $odd = '"Other Schema"."' . substr("Ta\"\"ble.$long", 0, 64) . '"';
as('app', qq{
CREATE TABLE $odd (id int, "Co (l) ""umn" text);
CREATE VIEW "Other Schema"."vi.ew" AS SELECT x."Co (l) ""umn" FROM $odd x;
CREATE VIEW "Other Schema"."on vi.ew" AS SELECT FROM "Other Schema"."vi.ew";
CREATE TRIGGER "tr ig" AFTER UPDATE OF "Co (l) ""umn" ON $odd FOR EACH ROW EXECUTE FUNCTION app.react();
CREATE POLICY "po licy" ON $odd TO "Odd ""Role" USING ("Co (l) ""umn" IS NOT NULL);
CREATE RULE "ru le" AS ON DELETE TO $odd WHERE OLD."Co (l) ""umn" IS NULL DO INSTEAD NOTHING;
});
my $odd_original = dump_schema();
exchange('app', $odd, 'Co (l) "umn', '');
same_dump(dump_schema(), $odd_original, 'quoted names');
is( as('app', "SELECT count(*) FROM risky_migrations.column_objects('$odd'::regclass, ARRAY[2::smallint])"), 5, 'of five objects');
is( as('app', "SELECT * FROM risky_migrations.column_obstacles('$odd'::regclass, 2::smallint)"), '', 'which are not in the way');

$node->stop;
done_testing();
