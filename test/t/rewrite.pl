# online_rewrite: the same table as after ALTER TABLE, whoever writes meanwhile.
#
# Every row says in a column of its own what its new value must be.  Clients
# insert, update, delete and move rows (also their keys) while the migration
# runs; in the end each row must have the value it asks for, the catalogs must
# say what they do after ALTER TABLE, and amcheck must find every row in every
# index.  The same with a server that is killed again and again, with values
# that do not convert, with foreign keys at both ends of the column, with a
# table that is emptied, rewritten or has its triggers switched off meanwhile.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = start_server('rewrite', q{
autovacuum = on
restart_after_crash = on
max_prepared_transactions = 5
risky_migrations.lock_retry_max_delay = 200
});
my $dir = PostgreSQL::Test::Utils::tempdir;
my $rows = 40000;

# ---------------------------------------------------------------------------
# The table, and what must be true of it
# ---------------------------------------------------------------------------

sub make_table
{
	my ($name) = @_;
	sql(qq{
		DROP TABLE IF EXISTS $name CASCADE;
		CREATE TABLE $name (gone int, id int, v varchar(40) NOT NULL, also_gone text,
			want bigint NOT NULL, big text, PRIMARY KEY (id));
		ALTER TABLE $name DROP COLUMN gone, DROP COLUMN also_gone;
		INSERT INTO $name (id, v, want, big)
		SELECT g, g * 3, g * 3, CASE WHEN g % 500 = 0 THEN
			(SELECT string_agg(md5((g * x)::text), '') FROM generate_series(1, 200) x) END
		FROM generate_series(1, $rows) g;
		ALTER TABLE $name ADD COLUMN late int DEFAULT 5;
		CREATE UNIQUE INDEX "$name U" ON $name (v DESC, id) INCLUDE (late) WITH (fillfactor = 70);
		CREATE INDEX ON $name ((v IS NULL), want) WHERE v IS NOT NULL;
		ALTER TABLE $name ADD CONSTRAINT ck CHECK (want >= 0);
		ALTER TABLE $name ADD CONSTRAINT ${name}_uq UNIQUE (want, id) DEFERRABLE INITIALLY DEFERRED;
		ALTER TABLE $name ALTER v SET STATISTICS 77, ALTER big SET STORAGE EXTERNAL, SET (fillfactor = 90);
		CREATE INDEX "$name L" ON $name (length(v::text) DESC, id);
		ALTER TABLE $name CLUSTER ON "$name U";
		COMMENT ON COLUMN $name.v IS 'what';
		COMMENT ON INDEX "$name U" IS 'why';
		CREATE STATISTICS ${name}_st (ndistinct) ON v, want FROM $name;
		CREATE VIEW ${name}_view WITH (security_barrier) AS SELECT id, v FROM $name WHERE v IS NOT NULL;
		GRANT SELECT ON ${name}_view TO PUBLIC;
		GRANT UPDATE (v) ON $name TO PUBLIC;
	});
	return;
}

sub check_rows
{
	my ($name, $what) = @_;
	is(sql("SELECT count(*) FROM $name WHERE v <> want OR v IS NULL"), '0', "$what: every row has its value");
	is(sql("SELECT pg_typeof(v) FROM $name LIMIT 1"), 'bigint', "$what: in the new type");
	sql('CREATE EXTENSION IF NOT EXISTS amcheck');
	my $nindexes = sql("SELECT count(*) FROM pg_index WHERE indrelid = '$name'::regclass");
	is(sql(qq{
		SELECT count(*), count(bt_index_check(i.indexrelid, true)::text) FROM pg_index i
		WHERE i.indrelid = '$name'::regclass AND i.indisvalid}),
		"$nindexes|$nindexes", "$what: every row is in every index");
	is(sql("SELECT count(*) FROM verify_heapam('$name')"), '0', "$what: and its pages are sound");
	return;
}

sub nothing_is_left
{
	my ($what) = @_;
	is(sql(q{SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^(shadow|log)_\d'
		UNION ALL SELECT string_agg(tgname, ', ') FROM pg_trigger WHERE tgname ~ '^~rm_'}),
		"\n", "$what: nothing is left");
	return;
}

# the definition, without OIDs in names
sub definitions_of
{
	my ($name, $as) = @_;
	return dump_of('-t', "$name*") =~ s/\b$name(?=\b|_|")/$as/gr;
}

# ---------------------------------------------------------------------------
# Beside writers
# ---------------------------------------------------------------------------

append_to_file("$dir/write.sql", q{
\set id random(1, 60000)
\set to random(1, 60000)
\set x random(1, 1000000000)
UPDATE busy SET v = :x, want = :x WHERE id = :id;
INSERT INTO busy (id, v, want) VALUES (:to, :x, :x) ON CONFLICT (id) DO UPDATE SET v = excluded.v, want = excluded.want;
BEGIN;
UPDATE busy SET v = '1', want = 1 WHERE id = :to;
SAVEPOINT s;
DELETE FROM busy WHERE id = :id;
ROLLBACK TO s;
UPDATE busy SET id = id + 100000 * (1 + :client_id) WHERE id = :id AND NOT EXISTS (SELECT FROM busy b WHERE b.id = busy.id + 100000 * (1 + :client_id));
COMMIT;
DELETE FROM busy WHERE id = :to;
INSERT INTO busy (id, v, want) VALUES (:to, :x, :x) ON CONFLICT (id) DO NOTHING;
});

make_table('busy');
make_table('twin');
my $pgbench = start_pgbench($dir, '-R', '300', '-c', '3', '-f', "$dir/write.sql");
wait_for("(SELECT count(*) FROM busy WHERE id > 100000) > 10", 'the clients do not write');
ends_well(start_call('migration', q{CALL rm_alter_type('busy', 'v', 'bigint', 'v::bigint', method => 'online_rewrite')}),
	'a migration beside writers ends');
ok(end_pgbench($pgbench), 'no writer failed') or diag slurp_file("$dir/err");
check_rows('busy', 'beside writers');
nothing_is_left('beside writers');
ok(sql("SELECT sum(rows_changed) FROM risky_migrations.step_log WHERE step IN ('catch_up', 'verify', 'cut_over', 'index')") > 0,
	'changes were replayed');
sql('ALTER TABLE twin DISABLE TRIGGER USER; DROP VIEW twin_view; ALTER TABLE twin ALTER v TYPE bigint USING v::bigint;
	CREATE VIEW twin_view WITH (security_barrier) AS SELECT id, v FROM twin WHERE v IS NOT NULL; GRANT SELECT ON twin_view TO PUBLIC');
is(definitions_of('busy', 'it'), definitions_of('twin', 'it'), 'the catalogs say what they do after ALTER TABLE');
is(sql("SELECT string_agg(s.attname, ',' ORDER BY s.tablename, s.attname) FROM pg_stats s WHERE s.tablename = 'busy' AND attname = 'v' OR s.tablename = 'busy L'"),
	'v,length', 'the column has statistics at once, and so has the index on an expression of it');
is(sql("SELECT n_distinct IS NOT NULL FROM pg_stats_ext WHERE statistics_name = 'busy_st'"), 't', 'and a statistics object');
sql('VACUUM FULL busy; REINDEX TABLE busy');
check_rows('busy', 'after VACUUM FULL and REINDEX');

# ---------------------------------------------------------------------------
# What comes in between
# ---------------------------------------------------------------------------

# starts a migration that stops before its cut-over
sub up_to_cut_over
{
	my ($name) = @_;
	make_table($name);
	sql("CALL rm_alter_type('$name', 'v', 'bigint', 'v::bigint', method => 'online_rewrite', cut_over => 'manual')");
	is(sql("SELECT next_call FROM rm_migrations WHERE state = 'open'"),
		sql("SELECT format('CALL rm_cut_over(%s)', max(id)) FROM rm_migrations"), "$name: stands before its cut-over");
	return;
}

up_to_cut_over('between');
sql(q{UPDATE between SET v = '8', want = 8 WHERE id < 100; DELETE FROM between WHERE id BETWEEN 200 AND 300});
sql('VACUUM FULL between');
sql(q{CREATE INDEX added ON between (v, late)});
sql('CALL rm_cut_over()');
check_rows('between', 'VACUUM FULL and an index in between');
is(sql('SELECT count(*) FROM between'), $rows - 101, 'no row came back');
is(sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'added'::regclass"), 't', 'the index is there');

up_to_cut_over('emptied');
sql(q{TRUNCATE emptied; INSERT INTO emptied (id, v, want) VALUES (1, '4', 4), (70000, '5', 5)});
sql('CALL rm_cut_over()');
check_rows('emptied', 'TRUNCATE in between');
is(sql('SELECT string_agg(id::text, \',\' ORDER BY id) FROM emptied'), '1,70000', 'what came after it is there, and nothing else');

up_to_cut_over('unwatched');
sql(q{ALTER TABLE unwatched DISABLE TRIGGER USER; UPDATE unwatched SET v = '9', want = 9 WHERE id < 50;
	ALTER TABLE unwatched ENABLE TRIGGER USER});
my (undef, undef, $err) = $node->psql('postgres', 'CALL rm_cut_over()');
check_rows('unwatched', 'triggers off for a moment');

up_to_cut_over('changed');
sql('ALTER TABLE changed ADD COLUMN more int');
(undef, undef, $err) = $node->psql('postgres', '\set VERBOSITY verbose
CALL rm_cut_over()');
like($err, qr/55000.*has been changed/s, 'another column in between ends the migration');
sql('CALL rm_rollback()');
nothing_is_left('given up');
is(sql("SELECT count(*) FROM changed WHERE v::bigint = want"), $rows, 'and the table is what it was');

# ---------------------------------------------------------------------------
# How rows are stored, changed in between
# ---------------------------------------------------------------------------

# the statements, with that name for @
sub on
{
	my ($name, $statements) = @_;
	sql($statements =~ s/\@/$name/gr);
	return;
}

my $toasts = q{SELECT string_agg(concat_ws(' ', t.relname = 'pg_toast_' || c.oid, t.relrewrite, t.reloptions, t.relowner::regrole,
		(SELECT string_agg(i.relname, ' ') FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid WHERE x.indrelid = t.oid AND i.relname = t.relname || '_index') = 'pg_toast_' || c.oid || '_index'),
		chr(10) ORDER BY c.relname)
	FROM pg_class c LEFT JOIN pg_class t ON t.oid = c.reltoastrelid WHERE c.relkind = 'r' AND c.relname ~ '^NAME'};

# The migration of "stored" stands before its cut-over while this is done, to its twin before
# ALTER TABLE does the change.
sub stored_as_its_twin
{
	my ($what, $create, $between, $type) = @_;
	foreach my $name ('stored', 'plainly')
	{
		sql("DROP TABLE IF EXISTS $name");
		on($name, $create);
		on($name, q{INSERT INTO @ SELECT g, g::text, 'x' FROM generate_series(1, 300) g});
	}
	sql("CALL rm_alter_type('stored', 'v', '$type', 'v::$type', method => 'online_rewrite', cut_over => 'manual')");
	on($_, $between) foreach 'stored', 'plainly';
	ends_well(start_call('cut over', 'CALL rm_cut_over()'), "$what: it is exchanged");
	sql("ALTER TABLE plainly ALTER v TYPE $type USING v::$type");
	is(definitions_of('stored', 'it'), definitions_of('plainly', 'it'), "$what: the definitions are those after ALTER TABLE");
	is(sql($toasts =~ s/NAME/stored/r), sql($toasts =~ s/NAME/plainly/r), "$what: and so is the TOAST table");
	nothing_is_left($what);
	return;
}

my $long = q{INSERT INTO @ VALUES (1000, '5', (SELECT string_agg(md5(g::text), '') FROM generate_series(1, 3000) g))};
my $short = q{CREATE TABLE @ (id int PRIMARY KEY, v varchar(10), b text)};
my $no_toast = "$short; ALTER TABLE @ ALTER b SET STORAGE PLAIN, ALTER id TYPE bigint";
stored_as_its_twin('options of the TOAST table', $short, "ALTER TABLE @ SET (toast.autovacuum_enabled = off, toast.autovacuum_vacuum_threshold = 77); $long", 'int');
stored_as_its_twin('none any more', "$short WITH (toast.autovacuum_enabled = off)", 'ALTER TABLE @ RESET (toast.autovacuum_enabled)', 'int');
stored_as_its_twin('others before', "$short WITH (toast.autovacuum_enabled = off)", $long, 'int');
stored_as_its_twin('no TOAST table without the column', 'CREATE TABLE @ (id int PRIMARY KEY, v text, b varchar(10)) WITH (toast.autovacuum_enabled = off)', 'ALTER TABLE @ SET (toast.autovacuum_vacuum_threshold = 77)', 'int');
stored_as_its_twin('a TOAST table by the column', 'CREATE TABLE @ (id int PRIMARY KEY, v varchar(10), b varchar(10))', 'ALTER TABLE @ SET (toast.autovacuum_enabled = off)', 'text');
stored_as_its_twin('a TOAST table is needed', $no_toast, 'ALTER TABLE @ ALTER b SET STORAGE EXTENDED', 'int');
on($_, $long) foreach 'stored', 'plainly';
is(sql('SELECT max(length(b)) FROM stored'), '96000', 'a long value is stored');
stored_as_its_twin('a TOAST table is needed at once, with options', $no_toast, "ALTER TABLE @ ALTER b SET STORAGE EXTERNAL; ALTER TABLE @ SET (toast.autovacuum_enabled = off); $long", 'int');
stored_as_its_twin('a column may be TOASTed', 'CREATE TABLE @ (id int PRIMARY KEY, v varchar(10), b text, c text); ALTER TABLE @ ALTER b SET STORAGE PLAIN',
	"ALTER TABLE @ ALTER b SET STORAGE MAIN, ALTER b SET COMPRESSION pglz; $long", 'int');
is(sql(q{SELECT pg_column_compression(b) FROM stored WHERE id = 1000}), sql(q{SELECT pg_column_compression(b) FROM plainly WHERE id = 1000}), 'as it says');
stored_as_its_twin('no TOAST table is needed', $short, 'ALTER TABLE @ ALTER b SET STORAGE PLAIN, SET (toast.autovacuum_enabled = off)', 'int');
stored_as_its_twin('partitions', 'CREATE TABLE @ (id int PRIMARY KEY, v varchar(10), b text) PARTITION BY RANGE (id);
	CREATE TABLE @_1 PARTITION OF @ FOR VALUES FROM (1) TO (100); CREATE TABLE @_2 PARTITION OF @ DEFAULT WITH (toast.autovacuum_enabled = off); ALTER TABLE @_1 ALTER b SET STORAGE PLAIN',
	"ALTER TABLE \@_1 SET (toast.autovacuum_enabled = off); ALTER TABLE @ ALTER b SET STORAGE EXTERNAL; ALTER TABLE \@_2 RESET (toast.autovacuum_enabled); $long", 'int');

# somebody else is at work on the shadow
sql('DROP TABLE stored, plainly');
on('stored', $short);
sql(q{CALL rm_alter_type('stored', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual')});
my $shadow = sql('SELECT shadow::regclass FROM risky_migrations.rewrite');
my $at_work = $node->background_psql('postgres', on_error_stop => 0);
$at_work->query("BEGIN; SELECT count(*) FROM $shadow");
sql('ALTER TABLE stored SET (toast.autovacuum_vacuum_threshold = 77)');
my $follow = start_call('cut over', "SET risky_migrations.lock_timeout = '60s'", 'CALL rm_cut_over()');
wait_for('EXISTS (SELECT FROM rm_progress WHERE lock_retries > 0)', 'the shadow is not waited for');
is(sql(q{SET lock_timeout = '10s'; BEGIN; LOCK TABLE stored; COMMIT; SELECT count(*) FROM stored}), '0', 'nobody waits while the shadow is waited for');
$at_work->query('COMMIT');
$at_work->quit;
ends_well($follow, 'then it goes on');
like(definitions_of('stored', 'it'), qr/toast.autovacuum_vacuum_threshold='77'/, 'with the options');
sql(q{CALL rm_alter_types('stored', '{}', method => 'online_rewrite')});
is(sql($toasts =~ s/NAME/stored/r), 't 0 {autovacuum_vacuum_threshold=77} postgres t', 'without a column, too');

# ---------------------------------------------------------------------------
# Event triggers
# ---------------------------------------------------------------------------

sql(q{
	CREATE TABLE told (name text, what text);
	CREATE ROLE successor;
	CREATE FUNCTION interfere() RETURNS event_trigger LANGUAGE plpgsql SET search_path = public AS $$
	DECLARE
		name text := current_setting('interfere.name', true);
	BEGIN
		IF name <> '' AND (tg_event = 'ddl_command_start' OR tg_tag <> 'ALTER TABLE' OR
			EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity = 'public.' || name)) THEN
			PERFORM set_config('interfere.name', '', false);
			EXECUTE replace(current_setting('interfere.how'), '@', name);
		END IF;
	END $$;
});

# As stored_as_its_twin(): this is done when such a command starts or ends.
sub interfered
{
	my ($event, $tag, $how) = @_;
	foreach my $name ('met', 'alone')
	{
		sql("DROP TABLE IF EXISTS $name CASCADE");
		on($name, q{CREATE TABLE @ (id int PRIMARY KEY, v text, b text, k int CHECK (k > 0));
			INSERT INTO @ SELECT g, g::text, 'x', g FROM generate_series(1, 100) g;
			CREATE INDEX @_v ON @ (v); CREATE INDEX @_k ON @ (k); CREATE VIEW @_view AS SELECT v FROM @});
	}
	sql(q{CALL rm_alter_type('met', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual')});
	sql("CREATE EVENT TRIGGER interfere ON $event WHEN TAG IN ('$tag') EXECUTE FUNCTION interfere()");
	my $as = "SET interfere.name = '\@'; SET interfere.how = \$\$$how\$\$;";
	my $call = start_call('cut over', $as =~ s/\@/met/r, 'CALL rm_cut_over()');
	my $ended = finish_call($call);
	on('alone', "$as DROP VIEW \@_view; ALTER TABLE @ ALTER v TYPE int USING v::int; CREATE VIEW \@_view AS SELECT v FROM @");
	sql('DROP EVENT TRIGGER interfere');
	return ($ended, $call->{err});
}

my $owners = q{SELECT string_agg(format('%s %s', c.relkind, c.relowner::regrole), ', ' ORDER BY c.relkind) FROM pg_class t, pg_class c
	WHERE t.relname = 'NAME' AND (c.oid IN (t.oid, t.reltoastrelid) OR c.oid IN (SELECT indexrelid FROM pg_index WHERE indrelid IN (t.oid, t.reltoastrelid)))};
foreach my $how (
	'ALTER TABLE @ OWNER TO successor', 'ALTER TABLE @ SET (fillfactor = 70, toast.autovacuum_enabled = off); ALTER INDEX @_k SET (fillfactor = 60)',
	'CREATE INDEX @_more ON @ (b); DROP INDEX @_k', 'ALTER TABLE @ ADD n int DEFAULT 5, ADD CHECK (k < 1000), ALTER b TYPE varchar', 'TRUNCATE @',
	q{INSERT INTO @ VALUES (1000, 1000, 'y', 1); DELETE FROM @ WHERE id = 5; UPDATE @ SET b = repeat(b, 3) WHERE k = 7; INSERT INTO told SELECT '@', format('%s %s', count(*), sum(v)) FROM @})
{
	my ($ended, $complaints) = interfered('ddl_command_end', 'ALTER TABLE', $how);
	ok($ended, "at the end of ALTER TABLE: $how") or diag $complaints;
	is(definitions_of('met', 'it'), definitions_of('alone', 'it'), 'the definitions are those after ALTER TABLE');
	is(sql($owners =~ s/NAME/met/r), sql($owners =~ s/NAME/alone/r), 'the owners too');
	is(sql('SELECT * FROM met EXCEPT SELECT * FROM alone UNION ALL (SELECT * FROM alone EXCEPT SELECT * FROM met)'), '', 'and so are the rows');
	is(sql(q{SELECT count(*) - count(bt_index_check(indexrelid, true)::text) FROM pg_index WHERE indrelid = 'met'::regclass}), '0', 'which are in every index');
	nothing_is_left($how);
}
is(sql('SELECT string_agg(what, chr(10)) FROM told'), "100 6045\n100 6045", 'an event trigger finds the rows');

foreach my $case (
	[ 'ddl_command_end', 'DROP VIEW', 'ALTER TABLE @ OWNER TO successor', 'another owner' ],
	[ 'ddl_command_end', 'DROP VIEW', 'CREATE INDEX @_more ON @ (b)', 'Index "met_more"' ],
	[ 'ddl_command_end', 'DROP VIEW', 'ALTER TABLE @ ADD n int', 'other columns' ],
	[ 'ddl_command_end', 'DROP VIEW', 'ALTER TABLE @ SET (toast.autovacuum_enabled = off)', 'other options' ],
	[ 'ddl_command_end', 'DROP VIEW', q{INSERT INTO @ VALUES (1000, 1000, 'y', 1)}, 'Rows were written' ],
	[ 'ddl_command_end', 'DROP VIEW', 'DELETE FROM @ WHERE id = 5', 'Rows were written' ],
	[ 'ddl_command_end', 'DROP VIEW', 'TRUNCATE @', 'Rows were written' ],
	[ 'ddl_command_start', 'DROP TRIGGER', q{INSERT INTO @ VALUES (1000, 1000, 'y', 1)}, 'Rows were written' ],
	[ 'ddl_command_end', 'DROP TRIGGER', q{INSERT INTO @ VALUES (1000, 1000, 'y', 1)}, 'Rows were written' ],
	[ 'ddl_command_start', 'ALTER TABLE', 'ALTER TABLE @ ADD CHECK (k < 1000)', 'CHECK constraints' ],
	[ 'ddl_command_start', 'ALTER TABLE', 'ALTER TABLE @ ALTER b SET STORAGE PLAIN', 'other columns' ],
	[ 'ddl_command_start', 'ALTER TABLE', q{INSERT INTO @ VALUES (1000, 1000, 'y', 1)}, 'Rows were written' ])
{
	my ($event, $tag, $how, $detail) = @$case;
	my ($ended, $complaints) = interfered($event, $tag, $how);
	ok(!$ended, "when $tag is met: $how");
	like($complaints, qr/55000.*met was changed in the middle of its cut-over.*$detail.*Nothing has been exchanged/s, 'it is refused');
	is(sql('SELECT count(*), min(pg_typeof(v)::text) FROM met'), '100|text', 'the table is what it was');
	sql('CALL rm_cut_over()');
	is(sql('SELECT count(*), min(pg_typeof(v)::text) FROM met'), '100|integer', 'and is exchanged without');
	nothing_is_left($how);
}

# ---------------------------------------------------------------------------
# Indexes that have nothing to do with the column, or are not what they should be
# ---------------------------------------------------------------------------

sub make_indexed
{
	my ($name) = @_;
	sql(qq{
		CREATE TABLE $name (id int PRIMARY KEY DEFERRABLE, v varchar(40) NOT NULL, want bigint NOT NULL, k int NOT NULL, r int4range NOT NULL, big text,
			UNIQUE (want) DEFERRABLE INITIALLY DEFERRED, UNIQUE (k) INCLUDE (v), EXCLUDE USING gist (r WITH &&));
		ALTER TABLE $name ALTER big SET STORAGE EXTERNAL;
		INSERT INTO $name SELECT g, g * 3, g * 3, -g, int4range(g, g + 1), repeat(g::text, 1000) FROM generate_series(1, 3000) g;
		CREATE UNIQUE INDEX ${name}_identity ON $name (k);
		ALTER TABLE $name REPLICA IDENTITY USING INDEX ${name}_identity;
		CREATE INDEX ${name}_cluster ON $name (k DESC, id);
		ALTER TABLE $name CLUSTER ON ${name}_cluster;
		CREATE INDEX ${name}_hash ON $name USING hash (k);
		CREATE INDEX ${name}_brin ON $name USING brin (want);
		CREATE INDEX ${name}_gin ON $name USING gin ((ARRAY[k]));
		CREATE INDEX ${name}_spgist ON $name USING spgist (r);
		CREATE INDEX ${name}_expr ON $name ((k % 100));
		CREATE INDEX ${name}_v ON $name (v);
		CREATE INDEX ${name}_only ON $name (id) WHERE v <> '7';
		CREATE INDEX ${name}_young ON $name (want, id);
		ANALYZE $name;
	});
	# as left behind by CREATE INDEX CONCURRENTLY
	foreach my $on ('k, want', 'v DESC')
	{
		my $index = "${name}_invalid_" . substr $on, 0, 1;
		sql("CREATE INDEX $index ON $name ($on); UPDATE pg_index SET indisvalid = false, indisready = false WHERE indexrelid = '$index'::regclass");
	}
	sql("UPDATE pg_index SET indcheckxmin = true WHERE indexrelid = '${name}_young'::regclass");
	return;
}

my $flags = q{SELECT string_agg(concat_ws(' ', replace(indexrelid::regclass::text, 'NAME', 'it'), indisunique, indisprimary, indisexclusion, indimmediate,
	indisclustered, indisvalid, indcheckxmin, indisready, indislive, indisreplident), chr(10) ORDER BY indexrelid::regclass::text)
	FROM pg_index WHERE indrelid = 'NAME'::regclass};

make_indexed($_) foreach 'indexed', 'idxtwin';
sql(q{CALL rm_alter_type('indexed', 'v', 'bigint', 'v::bigint', method => 'online_rewrite', cut_over => 'manual')});
sql(q{INSERT INTO indexed VALUES (4000, '6', 6000001, 1, '[4000,4001)', 'x'); UPDATE indexed SET v = '9', want = 6000002 WHERE id = 7});
my $log_end = -s $node->logfile;
sql(q{SET log_min_messages = debug1; CALL rm_cut_over()});
my $said = slurp_file($node->logfile, $log_end);
like($said, qr/rewriting table "indexed"/, 'ALTER TABLE rewrites the table');
unlike($said, qr/building index/, 'but builds no index, not of a TOAST table either');
sql('ALTER TABLE idxtwin ALTER v TYPE bigint USING v::bigint');
is(sql($flags =~ s/NAME/indexed/gr), sql($flags =~ s/NAME/idxtwin/gr), 'all flags of the indexes are what they are after ALTER TABLE');
is(sql(q{SELECT count(*), bool_and(indisvalid AND indisready AND indislive), sum(indisreplident::int), sum(indisclustered::int) FROM pg_index WHERE indrelid = 'indexed'::regclass}),
	'16|t|1|1', 'none is missing');
is(definitions_of('indexed', 'it'), definitions_of('idxtwin', 'it'), 'and so are the definitions');
is(sql(q{SELECT count(*), count(bt_index_check(i.indexrelid, true)::text) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
	WHERE i.indrelid = 'indexed'::regclass AND c.relam = (SELECT oid FROM pg_am WHERE amname = 'btree')}), '11|11', 'every row is in every B-tree');
foreach my $by (['hash', 'k = -44'], ['brin', 'want = 132'], ['gin', 'ARRAY[k] @> ARRAY[-44]'], ['spgist', 'r @> 44'], ['r_excl', 'r && int4range(44, 45)'],
	['invalid_k', 'k = -44 AND want = 132'], ['invalid_v', 'v = 132 ORDER BY v DESC'])
{
	my ($index, $where) = @$by;
	# no other one could be used instead
	my $out = sql(qq{BEGIN; SET LOCAL enable_seqscan = off; SET LOCAL client_min_messages = error;
		DO \$\$ DECLARE c regclass; BEGIN FOR c IN SELECT conname FROM pg_constraint WHERE conrelid = 'indexed'::regclass AND contype IN ('p', 'u', 'x') AND conname <> 'indexed_$index'
			LOOP EXECUTE 'ALTER TABLE indexed DROP CONSTRAINT ' || c; END LOOP;
			FOR c IN SELECT indexrelid FROM pg_index WHERE indrelid = 'indexed'::regclass AND indexrelid <> 'indexed_$index'::regclass LOOP EXECUTE 'DROP INDEX ' || c; END LOOP; END \$\$;
		EXPLAIN (COSTS OFF) SELECT id FROM indexed WHERE $where;
		SELECT id FROM indexed WHERE $where; ROLLBACK});
	like($out, qr/indexed_$index\b.*\n44$/s, "indexed_$index finds its row");
}
is(sql(q{SELECT count(*) FROM pg_stats WHERE tablename = 'indexed_expr'}), '1', 'an index on an expression has statistics');
(undef, undef, $err) = $node->psql('postgres', q{INSERT INTO indexed VALUES (5000, 1, 1, 5000, '[1,2)')});
like($err, qr/conflicting key value/, 'what is forbidden is forbidden');
is(sql(q{SELECT count(*), (SELECT relname = 'pg_toast_' || 'indexed'::regclass::oid FROM pg_class WHERE oid = (SELECT reltoastrelid FROM pg_class WHERE oid = 'indexed'::regclass))
	FROM indexed WHERE big = repeat(id::text, 1000)}), '3000|t', 'long values are there');
nothing_is_left('with all sorts of indexes');

# What serializable transactions have read through an index, where there was no row yet.
# The index is as if made by insertion from the end: its pages have other places afterwards.
sub read_then_written
{
	my ($columns, $what) = @_;
	sql(q{
		DROP TABLE IF EXISTS gap, aside;
		CREATE TABLE aside (x int); INSERT INTO aside VALUES (1);
		CREATE TABLE gap (id int PRIMARY KEY, v int);
		INSERT INTO gap SELECT -g, g FROM generate_series(1, 20000) g;
		ANALYZE gap, aside;
	});
	sql(qq{CALL rm_alter_types('gap', $columns, method => 'online_rewrite', cut_over => 'manual')});
	my $holder = $node->background_psql('postgres', on_error_stop => 0);
	$holder->query('BEGIN; LOCK TABLE gap IN ACCESS SHARE MODE');
	my $call = start_call('cut over', 'CALL rm_cut_over()');
	wait_for('EXISTS (SELECT FROM rm_progress WHERE lock_retries > 0)', 'the cut-over does not try for its lock');
	my $writer = $node->background_psql('postgres', on_error_stop => 0);
	$writer->query('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT x FROM aside');
	sql(q{SET enable_seqscan = off; SET enable_bitmapscan = off;
		BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(v) FROM gap WHERE id BETWEEN 5 AND 9; UPDATE aside SET x = 2; COMMIT});
	$holder->query('COMMIT');
	$holder->quit;
	ends_well($call, "$what: it is exchanged");
	$writer->query('INSERT INTO gap VALUES (7, 7); COMMIT');
	like($writer->{stderr}, qr/could not serialize access/, "$what: what was read through an index and is written after the exchange is a conflict");
	$writer->quit;
	return;
}

read_then_written(q{'{"v": "bigint"}'}, 'an index that the column is not in');
read_then_written(q{'{}'}, 'no column');

# ---------------------------------------------------------------------------
# A table of all sorts
# ---------------------------------------------------------------------------

# In a database of UTF-8, with names of 63 bytes whose last character has two.  What is
# "late" forbids ALTER TABLE, and comes after it in the twin's database.
$long = sub { my ($first) = @_; return '"' . $first . "\xC5\x9E" x 31 . '"' };
my ($sorts, $number, $sorts_index) = map { $long->($_) } 't', 'n', 'i';

sub make_sorts
{
	my ($database) = @_;
	sql("CREATE DATABASE $database TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'");
	$node->safe_psql($database, qq{
		CREATE SCHEMA s;
		SET search_path = s;
		CREATE TABLE peer (a int PRIMARY KEY, b int UNIQUE);
		INSERT INTO peer SELECT g, g FROM generate_series(1, 500) g;
		CREATE TABLE $sorts (gone int, id int GENERATED ALWAYS AS IDENTITY (START 1000), $number int NOT NULL, gone_too text, s serial, n int DEFAULT 5,
			r int4range, words tsvector, place point, txt text COMPRESSION pglz DEFAULT 'x', twice int GENERATED ALWAYS AS (n * 2) STORED,
			arr int[], j jsonb, up int,
			CONSTRAINT pk PRIMARY KEY (id) WITH (fillfactor = 77) USING INDEX TABLESPACE near,
			CONSTRAINT ex EXCLUDE USING gist (r WITH &&) WHERE (n > 0) DEFERRABLE, EXCLUDE USING btree ($number WITH =, id WITH =),
			CONSTRAINT un UNIQUE NULLS NOT DISTINCT (n, $number) INCLUDE (s) USING INDEX TABLESPACE far, UNIQUE ($number),
			UNIQUE ($number, s) DEFERRABLE INITIALLY DEFERRED, CONSTRAINT ck CHECK ($number > -5), CHECK (n > -5) NO INHERIT)
			WITH (fillfactor = 60, parallel_workers = 3, toast.autovacuum_enabled = off, toast_tuple_target = 300) TABLESPACE near;
		ALTER TABLE $sorts DROP gone, DROP gone_too, ALTER arr SET STORAGE EXTERNAL, ALTER j SET STORAGE MAIN,
			ALTER $number SET STATISTICS 321, ALTER $number SET (n_distinct = -0.25);
		INSERT INTO $sorts ($number, r, words, place, txt, arr, j, up) SELECT g, int4range(g, g + 1), to_tsvector('english', 'word' || g), point(g, g),
			CASE WHEN g % 50 = 0 THEN (SELECT string_agg(md5((g * x)::text), '') FROM generate_series(1, 200) x) ELSE 'z' END,
			ARRAY[g, g % 7], jsonb_build_object('a', g), CASE WHEN g > 1 THEN 999 + g / 2 END FROM generate_series(1, 500) g;
		ALTER TABLE $sorts ADD late int DEFAULT 77, ADD later text NOT NULL DEFAULT 'later', ADD CONSTRAINT unproven CHECK ($number < 400) NOT VALID;
		CREATE INDEX ON $sorts USING gin (arr);
		CREATE INDEX ON $sorts USING gin (j jsonb_path_ops) WITH (fastupdate = off) TABLESPACE far;
		CREATE INDEX ON $sorts USING gist (words tsvector_ops (siglen = 64));
		CREATE INDEX ON $sorts USING spgist (place);
		CREATE INDEX ON $sorts USING brin (n int4_minmax_multi_ops (values_per_range = 16), s int4_bloom_ops (n_distinct_per_range = 50)) WITH (pages_per_range = 8);
		CREATE INDEX hashed ON $sorts USING hash ($number) WITH (fillfactor = 50);
		CREATE INDEX expression ON $sorts (($number * 2), (s + 1)) TABLESPACE far;
		CREATE INDEX other ON $sorts ((s * 2), left(later, 3));
		ALTER INDEX other ALTER COLUMN 1 SET STATISTICS 400;
		CREATE INDEX ON $sorts (s DESC NULLS LAST, $number ASC NULLS FIRST) INCLUDE (n) WITH (deduplicate_items = off) WHERE $number > 3 AND n IS NOT NULL;
		CREATE INDEX ON $sorts (txt text_pattern_ops, txt COLLATE "POSIX") WHERE length(txt) < 100;
		CREATE INDEX $sorts_index ON $sorts ($number, late);
		CREATE UNIQUE INDEX identity ON $sorts ($number, id);
		ALTER TABLE $sorts REPLICA IDENTITY USING INDEX identity, CLUSTER ON $sorts_index;
		COMMENT ON INDEX hashed IS 'h';
		COMMENT ON CONSTRAINT un ON $sorts IS 'u';
		COMMENT ON CONSTRAINT ck ON $sorts IS 'c';
		CREATE STATISTICS st (ndistinct) ON $number, s FROM $sorts;
		ALTER STATISTICS st SET STATISTICS 55;
		CREATE STATISTICS of_expression ON ($number % 10), (n + 1) FROM $sorts;
		CREATE TABLE c1 (a int CONSTRAINT fk1 REFERENCES $sorts ($number) ON UPDATE CASCADE ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED);
		CREATE TABLE c2 (a int, b int CONSTRAINT fk3 REFERENCES $sorts ($number) MATCH FULL);
		INSERT INTO c2 VALUES (99999, 1);
		ALTER TABLE c2 ADD CONSTRAINT fk2 FOREIGN KEY (a) REFERENCES $sorts ($number) NOT VALID;
		ALTER TABLE $sorts ADD CONSTRAINT to_itself FOREIGN KEY (up) REFERENCES $sorts (id) ON DELETE CASCADE;
		ALTER TABLE $sorts ADD CONSTRAINT out FOREIGN KEY ($number) REFERENCES peer (b) DEFERRABLE;
		COMMENT ON CONSTRAINT fk3 ON c2 IS 'three';
		GRANT SELECT ($number), UPDATE (n, $number) ON $sorts TO PUBLIC;
		ANALYZE $sorts;
	});
	return;
}

my $late = qq{
	SET search_path = s;
	CREATE VIEW v1 AS SELECT * FROM $sorts WHERE $number > 0;
	CREATE VIEW v2 AS SELECT $number, count(*) OVER (PARTITION BY n) FROM v1;
	GRANT SELECT ON v2 TO PUBLIC;
	COMMENT ON COLUMN v2.$number IS 'v';
	CREATE RULE r1 AS ON UPDATE TO $sorts WHERE new.$number = -4 DO ALSO INSERT INTO peer VALUES (new.$number, new.$number);
	COMMENT ON RULE r1 ON $sorts IS 'r';
	CREATE RULE r2 AS ON INSERT TO v1 DO INSTEAD INSERT INTO $sorts ($number) VALUES (new.$number);
	ALTER TABLE $sorts ENABLE ROW LEVEL SECURITY;
	CREATE POLICY p1 ON $sorts AS RESTRICTIVE FOR SELECT USING ($number > 3);
	COMMENT ON POLICY p1 ON $sorts IS 'p';
	CREATE POLICY p2 ON $sorts FOR INSERT WITH CHECK (EXISTS (SELECT FROM peer WHERE b = $number));
	CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
	CREATE TRIGGER t1 AFTER UPDATE OF $number ON $sorts FOR EACH ROW WHEN (old.$number > 3) EXECUTE FUNCTION nothing();
	CREATE CONSTRAINT TRIGGER t2 AFTER INSERT ON $sorts DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (new.$number = 7) EXECUTE FUNCTION nothing();
	CREATE TRIGGER t3 AFTER INSERT ON $sorts REFERENCING NEW TABLE AS nt FOR EACH STATEMENT EXECUTE FUNCTION nothing();
	ALTER TABLE $sorts ENABLE REPLICA TRIGGER t1;
	COMMENT ON TRIGGER t1 ON $sorts IS 't';
};

sql($_) foreach 'SET allow_in_place_tablespaces = on; CREATE TABLESPACE near LOCATION \'\'; CREATE TABLESPACE far LOCATION \'\'';
make_sorts($_) foreach 'sorts', 'sortstwin';
$node->safe_psql('sorts', "CREATE EXTENSION risky_migrations; $late");
# what the session's tables would get is not for those that are there
$node->safe_psql('sorts', qq{SET default_tablespace = far;
	CALL rm_alter_types('s.$sorts', '{$number: "bigint", "id": "bigint", "up": "bigint", "txt": "varchar"}', method => 'online_rewrite')});
$node->safe_psql('sortstwin', "SET search_path = s; ALTER TABLE $sorts ALTER $number TYPE bigint, ALTER id TYPE bigint, ALTER up TYPE bigint, ALTER txt TYPE varchar");
$node->safe_psql('sortstwin', $late);
is(dump_in('sorts', '-n', 's'), dump_in('sortstwin', '-n', 's'), 'all sorts: the catalogs say what they do after ALTER TABLE');
is($node->safe_psql('sorts', $_), $node->safe_psql('sortstwin', $_), 'all sorts: so do those that are not dumped')
  foreach qq{SELECT attname, attstorage, attcompression, attstattarget, attmissingval FROM pg_attribute WHERE attrelid = 's.$sorts'::regclass ORDER BY attnum},
	qq{SELECT relname ~ '^pg_toast_', relname = 'pg_toast_' || 's.$sorts'::regclass::oid, t.reloptions, spcname, t.relrewrite FROM pg_class t JOIN pg_tablespace s ON s.oid = reltablespace
		WHERE t.oid = (SELECT reltoastrelid FROM pg_class WHERE oid = 's.$sorts'::regclass)},
	qq{SELECT md5(string_agg(t::text, '-' ORDER BY s)) FROM s.$sorts t};

# Statistics as detailed as the table's, with what is known better than by ANALYZE; those of
# what ALTER TABLE leaves alone stay.  An index that is moved in between stays where it is.
sql(q{
	CREATE TABLE known (id int PRIMARY KEY, v int, w int);
	INSERT INTO known SELECT g, g, g FROM generate_series(1, 5000) g;
	CREATE INDEX known_v ON known (v);
	CREATE INDEX known_w ON known ((w + 1));
	ALTER TABLE known ALTER v SET STATISTICS 300, ALTER v SET (n_distinct = -0.5);
	ALTER INDEX known_w ALTER COLUMN 1 SET STATISTICS 200;
	ANALYZE known;
	CALL rm_alter_type('known', 'v', 'bigint', method => 'online_rewrite', cut_over => 'manual');
	ALTER INDEX known_v SET TABLESPACE near;
	ALTER INDEX known_pkey SET TABLESPACE far;
	UPDATE known SET v = v + 1;
	CALL rm_cut_over();
});
is(sql(q{SELECT string_agg(concat_ws(' ', attname, n_distinct, array_length(histogram_bounds::text::text[], 1)), ', ' ORDER BY tablename)
	FROM pg_stats WHERE tablename ~ '^known' AND attname IN ('v', 'expr')}), 'v -0.5 301, expr -1 201', 'statistics are as detailed as those of the table');
is(sql(q{SELECT string_agg(relname || ' ' || coalesce(spcname, '-'), ', ' ORDER BY relname) FROM pg_class c LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
	WHERE relname ~ '^known_'}), 'known_pkey far, known_v near, known_w -', 'an index that was moved stays there');

# ---------------------------------------------------------------------------
# Rows that are changed beside the copying, and come to where it has not been yet
# ---------------------------------------------------------------------------

# By its xid the new version could be one from before the log: it is frozen, or of a
# subtransaction that was not known of its parent, which had too many.  While the gate is
# closed row 500 is not copied.
sql(q{CREATE FUNCTION slowly(v text) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
	BEGIN IF v = '500' THEN PERFORM pg_advisory_xact_lock_shared(5); END IF; RETURN v::int; END $$});
foreach my $young ('frozen', 'of a subtransaction')
{
	sql(q{
		DROP TABLE IF EXISTS young, elsewhere;
		CREATE TABLE elsewhere (i int);
		CREATE TABLE young (id int PRIMARY KEY, v text NOT NULL, filler text);
		INSERT INTO young SELECT g, g, repeat('x', 1000) FROM generate_series(1, 700) g;
		DELETE FROM young WHERE id BETWEEN 651 AND 699;
		VACUUM young;
	});
	my $gate = close_gate(5);
	my $writer = $node->background_psql('postgres');
	$writer->query_safe('BEGIN');
	$writer->query_safe(q{DO $$ BEGIN FOR i IN 1 .. 100 LOOP BEGIN INSERT INTO elsewhere VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$;
		SAVEPOINT s; INSERT INTO elsewhere VALUES (0)}) if $young ne 'frozen';
	my $call = start_call('migration', 'SET risky_migrations.lock_retries = 1000',
		q{CALL rm_alter_type('young', 'v', 'int', 'slowly(v)', method => 'online_rewrite', batch => 100, cut_over => 'manual')});
	becomes(q{EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 5 AND NOT granted)}, "$young: a part is copied");
	$writer->query_safe(q{UPDATE young SET v = '7000' WHERE id = 5; COMMIT});
	$writer->quit;
	cmp_ok(sql(q{SELECT (ctid::text::point)[0] FROM young WHERE id = 5}), '>', 80, "$young: a row that has been copied is where it has not been");
	is(sql('SELECT s0_overflowed FROM risky_migrations.rewrite'), $young eq 'frozen' ? 'f' : 't', "$young: what is known of subtransactions");
	if ($young eq 'frozen')
	{
		my $frozen = q{(SELECT age(c.relfrozenxid) < age(y.xmin) FROM pg_class c, young y WHERE c.oid = 'young'::regclass AND y.id = 5)};

		# a try of the copy may have an older snapshot
		for (1 .. 1000)
		{
			sql('VACUUM (FREEZE) young');
			last if sql("SELECT $frozen") eq 't';
			usleep(10_000);
		}
		is(sql("SELECT $frozen"), 't', 'it is frozen');
	}
	$gate->quit;
	ends_well($call, "$young: the rest is copied");
	sql('CALL rm_cut_over()');
	is(sql('SELECT count(*), count(DISTINCT id), sum(v) FROM young'), 651 . '|' . 651 . '|' . (651 * 650 / 2 + 700 - 5 + 7000), "$young: each row is there once");
}

# ---------------------------------------------------------------------------
# Few buffers
# ---------------------------------------------------------------------------

# this server has 128 of them; each of these rows lies in one of its own
is(sql('SHOW shared_buffers'), '1MB', 'there are few buffers');
sql(q{
	CREATE TABLE wide (id int PRIMARY KEY, v text, want int, filler text) WITH (fillfactor = 10);
	ALTER TABLE wide ALTER filler SET STORAGE PLAIN;
	INSERT INTO wide SELECT g, g::text, g, repeat('x', 1900) FROM generate_series(1, 600) g;
	CALL rm_alter_type('wide', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual');
	UPDATE wide SET v = want + 1, want = want + 1;
	CALL rm_cut_over();
});
is(sql('SELECT count(*), sum((v <> want)::int), min(pg_typeof(v)::text) FROM wide'), '600|0|integer', 'rows of many pages are replayed');

# ---------------------------------------------------------------------------
# More is written than can be replayed
# ---------------------------------------------------------------------------

# While somebody writes (and holds a lock), each round waits, with row 1, until all rows
# have been changed once more.
sql(q{
	CREATE SEQUENCE rounds;
	CREATE SEQUENCE changes;
	CREATE FUNCTION in_step(v text) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
	DECLARE
		n bigint;
	BEGIN
		IF v = '1' AND NOT pg_try_advisory_xact_lock_shared(6) THEN
			n := nextval('public.rounds');
			WHILE (SELECT last_value < n OR NOT is_called FROM public.changes) LOOP
				PERFORM pg_sleep(0.005);
			END LOOP;
		END IF;
		RETURN v::int;
	END $$;
	CREATE TABLE written (id int PRIMARY KEY, v text NOT NULL);
	INSERT INTO written SELECT g, g FROM generate_series(1, 2500) g;
});
my $writing = start_call('writer', 'SELECT pg_advisory_lock(6)', q{DO $$
	DECLARE
		n bigint := 0;
	BEGIN
		LOOP
			WHILE (SELECT last_value <= n OR NOT is_called FROM public.rounds) LOOP
				IF EXISTS (SELECT FROM rm_migrations WHERE relation = 'public.written' AND last_step_state = 'failed') THEN
					RETURN;
				END IF;
				PERFORM pg_sleep(0.005);
				COMMIT;
			END LOOP;
			UPDATE written SET v = v;
			COMMIT;
			n := nextval('public.changes');
		END LOOP;
	END $$});
becomes(q{EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 6 AND granted)}, 'somebody writes');
(undef, undef, $err) = $node->psql('postgres', q{\set VERBOSITY verbose
CALL rm_alter_type('written', 'v', 'int', 'in_step(v)', method => 'online_rewrite')});
like($err, qr/55000: the application writes public\.written faster than its changes can be replayed.*\n.*20 rounds in a row/, 'it says that it does not catch up');
ends_well($writing, 'the writer ends then');
sql(q{SELECT rm_resume()});
becomes(q{(SELECT state = 'done' FROM rm_migrations WHERE relation = 'public.written')}, 'and at a quieter hour it comes to its end');

# ---------------------------------------------------------------------------
# Values that do not convert
# ---------------------------------------------------------------------------

make_table('odd');
sql(q{UPDATE odd SET v = 'x' WHERE id = 17});
(undef, undef, $err) = $node->psql('postgres', q{\set VERBOSITY verbose
CALL rm_alter_type('odd', 'v', 'bigint', 'v::bigint', method => 'online_rewrite')});
like($err, qr/23502.*1 row of public.odd has no new value/s, 'a value that does not convert stops the cut-over');
is(sql("SELECT row_key || ' ' || value || ' ' || sqlstate FROM rm_conversion_errors"), '(id)=(17) x 22P02', 'and is recorded');
is(sql("SELECT count(*) FROM odd"), $rows, 'readers go on');
sql(q{INSERT INTO odd (id, v, want) VALUES (90000, 'y', 1)});
sql(q{UPDATE odd SET v = want WHERE id IN (17, 90000)});
sql('CALL rm_cut_over()');
check_rows('odd', 'mended');

# NOT NULL says nothing of the rows that were there before it, if it is not valid
if ($node->pg_version >= 18)
{
	sql(q{
		CREATE TABLE half (id int PRIMARY KEY, v text, other int);
		INSERT INTO half VALUES (1, NULL, NULL), (2, '2', 2);
		ALTER TABLE half ADD CONSTRAINT half_v NOT NULL v NOT VALID, ADD CONSTRAINT half_other NOT NULL other NOT VALID;
		CREATE UNIQUE INDEX half_key ON half (other);
		CALL rm_alter_type('half', 'v', 'bigint', 'v::bigint', method => 'online_rewrite');
	});
	is(sql(q{SELECT string_agg(format('%s %s', conname, convalidated), ', ' ORDER BY conname) FROM pg_constraint
		WHERE conrelid = 'half'::regclass AND contype = 'n'}), 'half_id_not_null t, half_other f, half_v f', 'NOT NULL is as valid as it was');
	is(sql('SELECT count(*), count(v), count(other), min(pg_typeof(v)::text) FROM half'), '2|1|1|bigint', 'and the rows are there');
	sql('ALTER TABLE half DROP CONSTRAINT half_pkey');
	(undef, undef, $err) = $node->psql('postgres', q{\set VERBOSITY verbose
CALL rm_alter_type('half', 'v', 'int', 'v::int', method => 'online_rewrite')});
	like($err, qr/0A000: .*key/s, 'nor does it make a key');
}

# ---------------------------------------------------------------------------
# Foreign keys, and the key itself
# ---------------------------------------------------------------------------

sql(q{
	CREATE TABLE parent (id int PRIMARY KEY);
	INSERT INTO parent SELECT generate_series(1, 1000);
	CREATE TABLE node (id int PRIMARY KEY, up int REFERENCES parent ON DELETE CASCADE);
	INSERT INTO node SELECT g, g FROM generate_series(1, 1000) g;
	CREATE TABLE child (id int PRIMARY KEY, node int CONSTRAINT to_node REFERENCES node DEFERRABLE);
	INSERT INTO child SELECT g, g FROM generate_series(1, 1000) g;
	COMMENT ON CONSTRAINT to_node ON child IS 'up';
});
sql(q{CALL rm_alter_type('node', 'id', 'bigint', method => 'online_rewrite')});
sql(q{CALL rm_alter_type('node', 'up', 'bigint', method => 'online_rewrite')});
is(sql(q{SELECT string_agg(format('%s %s %s %s', conname, convalidated, condeferrable, obj_description(oid, 'pg_constraint')), ', ' ORDER BY conname)
	FROM pg_constraint WHERE contype = 'f' AND conrelid IN ('node'::regclass, 'child'::regclass)}), 'node_up_fkey t f , to_node t t up', 'foreign keys are what they were, and proven');
isnt($node->psql('postgres', 'DELETE FROM node WHERE id = 5'), 0, 'and in force');
is(sql('SELECT pg_typeof(id)::text || pg_typeof(up)::text FROM node LIMIT 1'), 'bigintbigint', 'both columns have their types');

# ---------------------------------------------------------------------------
# Nobody waits while the change log is waited for
# ---------------------------------------------------------------------------

sql(q{
	CREATE TABLE logged (id int PRIMARY KEY, v text);
	INSERT INTO logged VALUES (1, '1');
	CALL rm_alter_type('logged', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual');
});
my $log = sql('SELECT log::regclass FROM risky_migrations.rewrite');
my $log_reader = $node->background_psql('postgres', on_error_stop => 0);
$log_reader->query("BEGIN; LOCK TABLE $log IN ACCESS SHARE MODE");
my $cut_over = start_call('cut over', "SET risky_migrations.lock_timeout = '60s'", 'CALL rm_cut_over()');
becomes("EXISTS (SELECT FROM pg_locks WHERE relation = '$log'::regclass AND mode = 'AccessExclusiveLock' AND NOT granted)", 'the cut-over waits for the change log');
is(sql("SET lock_timeout = '10s'; SELECT v FROM logged"), '1', 'the table is read meanwhile');
$log_reader->query('COMMIT');
ends_well($cut_over, 'then it goes on');

# the same when it is given up
sql(q{CALL rm_alter_type('logged', 'v', 'bigint', method => 'online_rewrite', cut_over => 'manual')});
$shadow = sql('SELECT shadow::regclass FROM risky_migrations.rewrite');
$log_reader->query("BEGIN; LOCK TABLE $shadow IN ACCESS SHARE MODE");
my $rollback = start_call('rollback', "SET risky_migrations.lock_timeout = '60s'", 'CALL rm_rollback()');
becomes("EXISTS (SELECT FROM pg_locks WHERE relation = '$shadow'::regclass AND mode = 'AccessExclusiveLock' AND NOT granted)", 'the way back waits for the shadow');
is(sql("SET lock_timeout = '10s'; SELECT v FROM logged"), '1', 'the table is read meanwhile');
$log_reader->query('COMMIT');
$log_reader->quit;
ends_well($rollback, 'then it goes on');

# ---------------------------------------------------------------------------
# As a role that owns the table, and nothing else
# ---------------------------------------------------------------------------

sql(q{
	CREATE ROLE app LOGIN; CREATE ROLE other LOGIN;
	CREATE SCHEMA app AUTHORIZATION app;
	CREATE TABLE app.mine (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), v varchar(20) CHECK (length(v::text) < 9), w text);
	INSERT INTO app.mine (v, w) SELECT g::text, 'w' || g FROM generate_series(1, 3000) g;
	CREATE INDEX ON app.mine (v);
	ALTER TABLE app.mine OWNER TO app;
});
sub as
{
	my ($role, $query) = @_;
	my ($status, $out, $err) = $node->psql('postgres', $query, extra_params => [ '-U', $role, '-v', 'VERBOSITY=verbose' ]);
	return $status ? $err : $out;
}
like(as('other', q{CALL rm_alter_type('app.mine', 'v', 'int', 'v::int', method => 'online_rewrite')}), qr/42501/,
	'another role cannot start it');
is(as('app', q{CALL rm_alter_type('app.mine', 'v', 'int', 'v::int', method => 'online_rewrite', cut_over => 'manual')}), '',
	'the owner does all of it');
my $mine = sql("SELECT max(id) FROM rm_migrations");
foreach my $of ('shadow', 'log')
{
	my $table = sql("SELECT $of\::regclass FROM risky_migrations.rewrite WHERE migration_id = $mine");
	like(as('other', "SELECT * FROM $table"), qr/42501/, "another role does not read the $of");
}
like(as('other', "CALL rm_cut_over($mine)"), qr/42501/, 'nor cut over');
is(as('app', "UPDATE app.mine SET v = '1' WHERE v = '2'; CALL rm_cut_over($mine)"), '', 'the owner does');
is(sql("SELECT format('%s %s %s', count(*), sum(v), pg_typeof(min(v))) FROM app.mine"), '3000 4501499 integer', 'and all rows are there');

# ---------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------

foreach my $round (1 .. 4)
{
	make_table('killed');
	my $call = start_call('migration', q{CALL rm_alter_type('killed', 'v', 'bigint', 'v::bigint', method => 'online_rewrite', batch => 3000)});
	wait_for("EXISTS (SELECT FROM rm_progress WHERE relation = 'public.killed')", 'it does not begin');
	usleep(1000 * (50 + 250 * $round));
	$node->stop('immediate');
	finish_call($call);
	$node->start;
	sql(q{UPDATE killed SET v = '11', want = 11 WHERE id % 100 = 3});
	my $id = sql("SELECT id FROM rm_migrations WHERE state = 'open'");
	if ($id)
	{
		# after the cut-over there is no way back
		if ($round == 2 && sql("SELECT steps_done < 6 FROM rm_migrations WHERE id = $id") eq 't')
		{
			sql("CALL rm_rollback($id)");
			nothing_is_left('killed and taken back');
			is(sql('SELECT count(*) FROM killed WHERE v::bigint = want'), $rows, 'every row is there');
			next;
		}
		sql("SELECT rm_resume($id)");
		becomes("(SELECT state = 'done' FROM rm_migrations WHERE id = $id)", "killed in round $round, it goes on to its end");
	}
	check_rows('killed', "killed in round $round");
}
nothing_is_left('killed');

done_testing();
