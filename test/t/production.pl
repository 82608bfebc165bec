# What happens to three_step on a machine as it is in production: no worker is
# free, an index cannot be built or its building is cancelled, the disk is full
# (with online_rewrite too), the role has settings of its own, others change the
# table in between.  Each time: is the state true, can the table be used, does it
# go on, and is nothing left when it is taken back?
#
# The full disk is a small tmpfs, mounted in a namespace of this test's own, for
# which nobody needs to be root.  Where that is not allowed that part is skipped.

use strict;
use warnings;

BEGIN
{
	my @own = qw(unshare --user --mount --map-current-user --keep-caps);

	if (!defined $ENV{RM_OWN_MOUNTS} && !system("@own true 2>/dev/null"))
	{
		$ENV{RM_OWN_MOUNTS} = 1;
		exec @own, $^X, (map { "-I$_" } @INC), $0 or die "cannot run unshare: $!";
	}
}

use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = LabNode->new('production');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
autovacuum = off
fsync = off
max_worker_processes = 4
client_min_messages = warning
risky_migrations.lock_retries = 5
});
$node->start;

sub sql
{
	my ($query, $role) = @_;
	return $node->safe_psql('postgres', $query, $role ? (extra_params => [ '-U', $role ]) : ());
}

# SQLSTATE, detail and hint of the error with which the statements end.
sub error_of
{
	my ($query, $role) = @_;
	my (undef, undef, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\n$query",
		$role ? (extra_params => [ '-U', $role ]) : ());
	return ($stderr =~ /ERROR:  ([0-9A-Z]{5}):/ ? "$1" : '', $stderr =~ /DETAIL:  (.*)/ ? "$1" : '',
		$stderr =~ /HINT:  (.*)/ ? "$1" : '', $stderr);
}

# A statement that is under way in a session of its own.
sub begin
{
	my ($query) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	$session->query_until(qr/begun/, "\\echo begun\n$query\n");
	return $session;
}

sub becomes
{
	my ($query, $expected, $name) = @_;
	ok($node->poll_query_until('postgres', $query, $expected), $name);
	return;
}

# Everything that there is on the table, as pg_dump tells it.
sub shape
{
	my ($table) = @_;
	my ($dump, $stderr) = run_command([ 'pg_dump', '-s', '-t', $table, $node->connstr('postgres') ]);
	$dump =~ s/^\\(?:un)?restrict .*\n//mg;
	return $dump;
}

# The shape does not show an index that is not valid.
my $invalid = 'SELECT count(*) FROM pg_index WHERE NOT indisvalid';
my $last = 'SELECT last_step, last_step_state, sqlstate FROM rm_migrations ORDER BY id DESC LIMIT 1';

# Makes a table and brings its column v to where what hangs on it is built.
sub up_to_build
{
	my ($table, $values) = @_;
	sql(qq{
CREATE TABLE $table (id int PRIMARY KEY, v text UNIQUE, w text CHECK (w <> ''));
CREATE INDEX ${table}_v_w ON $table (w, v);
INSERT INTO $table SELECT g, $values, 'w' FROM generate_series(1, 1000) g;
});
	my $shape = shape($table);
	sql(qq{
CALL rm_add_column('$table', 'v', 'numeric', 'v::numeric');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
});
	return $shape;
}

sql(q{
CREATE EXTENSION risky_migrations;
CREATE ROLE app LOGIN;
GRANT CREATE ON SCHEMA public TO app;
});

# ---------------------------------------------------------------------------
# Values that are equal in the new type
# ---------------------------------------------------------------------------

{
	my $shape = up_to_build('twice', 'g::text');
	sql(q{INSERT INTO twice VALUES (1001, '7.00', 'w')});
	my ($state, $detail, $hint) = error_of('CALL rm_swap()');
	is($state, '23505', 'two values that are equal in the new type: the index is not built');
	like($hint, qr/mend them.*rm_rollback/, 'what to do is said');
	is(sql($invalid), 0, 'and it is not left behind, where it would refuse writes');
	is(sql($last), 'build|failed|23505', 'the state is true');
	sql(q{INSERT INTO twice VALUES (1002, '8.0', 'w')});
	pass('the old column takes what differs in the old type');
	sql(q{DELETE FROM twice WHERE id > 1000; CALL rm_swap()});
	is(sql('SELECT count(*) FROM twice WHERE v = id'), 1000, 'mended, it goes on');

	# by position
	is(sql(q{INSERT INTO twice VALUES (2000, '2000', 'w') RETURNING v}), 2000,
		'after the swap an INSERT by position gives the new column its value');
	is((error_of(q{INSERT INTO twice VALUES (2001, 'nothing', 'w')}))[0], '22P02', 'or fails as in the changed table');
	sql('DELETE FROM twice WHERE id = 2000');
	($state, $detail, $hint) = error_of(q{INSERT INTO twice (id, v_old, w, v) VALUES (2000, '2000', 'w', 7)});
	is($state, '428C9', 'two values that do not belong together are refused: one would be lost');
	like($hint, qr/Name the columns/, 'what to do is said');
	is((error_of(qq{COPY twice FROM stdin;\n2000\t1\tw\n\\.\n}))[0], '22P04',
		'COPY wants all columns');
	sql(q{INSERT INTO twice (id, w, v) VALUES (2000, 'w', 2000)});
	sql(q{CREATE TABLE copied AS SELECT * FROM twice WHERE id IN (5, 2000);
		DELETE FROM twice WHERE id IN (5, 2000); INSERT INTO twice SELECT * FROM copied; DROP TABLE copied});
	is(sql(q{SELECT string_agg(concat_ws('/', id, v_old, v), ' ' ORDER BY id) FROM twice WHERE id IN (5, 2000)}),
		'5/5/5 2000/2000/2000', 'whole rows are put back');
	sql('DELETE FROM twice WHERE id = 2000; CALL rm_rollback()');
	is(shape('twice'), $shape, 'taken back, nothing is left');
}

# no way back, and an INSERT by position
{
	sql(q{
CREATE TABLE oneway (id int, v text);
INSERT INTO oneway SELECT g, 'x' FROM generate_series(1, 10) g;
CREATE TYPE pair AS (a int, b int);
CALL rm_alter_type('oneway', 'v', 'pair', 'row(length(v), 1)::pair');
});
	is(sql(q{INSERT INTO oneway VALUES (11, 'four') RETURNING v}), '(4,1)', 'without a way back likewise');
	sql('CALL rm_cleanup()');
}

# ---------------------------------------------------------------------------
# No worker
# ---------------------------------------------------------------------------

{
	my $shape = up_to_build('workers', 'g::text');
	1 while (error_of(q{SELECT rm_probe_start('SELECT 1', every => '1 s')}))[0] eq '';
	my ($state, $detail, $hint) = error_of('SET risky_migrations.lock_retries = 0; CALL rm_swap()');
	is($state, '53000', 'no worker is free for an index');
	like($hint, qr/max_worker_processes/, 'what to do is said');
	is(sql($last), 'build|failed|53000', 'the state is true');
	sql(q{UPDATE workers SET v = v || '.5' WHERE id = 3});
	my $session = begin('CALL rm_swap();');
	becomes(q{SELECT waiting_for, waiting_reason ~ 'no background worker is free' FROM rm_progress}, 'worker|t',
		'it waits for one, and shows that');
	sql('SELECT rm_probe_stop(id) FROM risky_migrations.probe');
	becomes('SELECT steps_done FROM rm_migrations ORDER BY id DESC LIMIT 1', 5,
		'when one is free it goes on by itself');
	$session->quit;
	is(sql('SELECT v FROM workers WHERE id = 3'), '3.5', 'with what was written meanwhile');
	sql('UPDATE workers SET v = 3 WHERE id = 3; CALL rm_rollback()');
	is(shape('workers'), $shape, 'taken back, nothing is left');
}

# ---------------------------------------------------------------------------
# A cancelled CREATE INDEX CONCURRENTLY
# ---------------------------------------------------------------------------

{
	my $shape = up_to_build('cancelled', 'g::text');
	my $writer = $node->background_psql('postgres');
	my $building = q{SELECT count(*) FROM pg_stat_activity
		WHERE backend_type LIKE 'risky_migrations%' AND query LIKE 'CREATE%INDEX%' AND wait_event_type = 'Lock'};

	$writer->query_safe(q{BEGIN; INSERT INTO cancelled VALUES (5000, 5000, 'w')});
	my $session = begin('CALL rm_swap();');
	becomes($building, 1, 'the index waits for a writer');
	becomes(q{SELECT waiting_for, waiting_reason ~ '^CREATE INDEX CONCURRENTLY \w+: waiting for writers before build \(process \d+\)$' FROM rm_progress},
		'worker|t', 'rm_progress shows that, and for whom');
	sql(q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CREATE%INDEX%' AND backend_type LIKE 'risky_migrations%'});
	becomes($last, 'build|failed|57014', 'somebody cancels it: the state is true');
	is(sql($invalid), 1, 'the index that is not valid is there');
	$session->quit;
	$session = begin('CALL rm_swap();');
	becomes(q{SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DROP INDEX%' AND wait_event_type = 'Lock'}, 1,
		'the next call drops it');
	sql(q{SELECT rm_cancel(max(id)) FROM rm_migrations});
	becomes($last, 'build|failed|57014', 'rm_cancel ends also that');
	$session->quit;
	$writer->query_safe('COMMIT');
	$writer->quit;
	sql(q{CALL rm_swap()});
	is(sql($invalid), 0, 'and it is made anew');
	is(sql('SELECT count(*) FROM cancelled WHERE v IS NOT NULL'), 1001, 'with the writer\'s row');
	sql('CALL rm_rollback(); DELETE FROM cancelled WHERE id = 5000');
	is(shape('cancelled'), $shape, 'taken back, nothing is left');
}

# ---------------------------------------------------------------------------
# Others undo what was looked at, each time: it says so, and can go on
# ---------------------------------------------------------------------------

sub gives_up
{
	my ($call, $why, $name) = @_;
	my ($state, $detail, $hint, $stderr) = error_of($call);
	is($state, '55000', "$name: not for ever");
	like($stderr, qr/had to begin again 20 times/, "$name: it says how often");
	like($detail, $why, "$name: and why");
	like($hint, $call =~ /rollback/ ? qr/CALL rm_rollback\(\d+\) again.*CALL rm_cleanup/ : qr/next_call in rm_migrations.*CALL rm_rollback/, "$name: and what to do");
	return;
}

# For each index that is built somebody makes another one, until there are 60.
{
	sql(q{
CREATE TABLE eager (id int, v text);
CREATE INDEX eager_v ON eager (v);
INSERT INTO eager SELECT g, g FROM generate_series(1, 1000) g;
});
	my $shape = shape('eager');
	sql(q{
CALL rm_add_column('eager', 'v', 'numeric', 'v::numeric');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
CREATE FUNCTION one_more() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
	IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity ~ '^public.rm_n_')
		AND (SELECT count(*) FROM pg_index WHERE indrelid = 'eager'::regclass) < 60 THEN
		EXECUTE format('CREATE INDEX more_%s ON eager (v)', (SELECT count(*) FROM pg_index WHERE indrelid = 'eager'::regclass));
	END IF;
END $$;
CREATE EVENT TRIGGER one_more ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION one_more();
});
	gives_up('CALL rm_swap()', qr/definition of public.eager/, 'DDL while it builds');
	is(sql($last), 'build|failed|55000', 'the state is true');
	sql('DROP EVENT TRIGGER one_more; CALL rm_swap()');
	is(sql('SELECT count(*) FROM eager WHERE v = id'), 1000, 'it goes on');
	sql('CALL rm_rollback()');
	sql("DROP INDEX $_") foreach split /\n/, sql(q{SELECT indexrelid::regclass FROM pg_index WHERE indrelid = 'eager'::regclass AND indexrelid::regclass::text ~ '^more_'});
	is(shape('eager'), $shape, 'taken back, nothing is left');
}

# Values that do not convert, in rows that ON CONFLICT DO NOTHING leaves out: each is
# recorded.  The expression itself writes one, in each look at the table; 500 in all.
{
	sql(q{
CREATE TABLE spoils (how text);
CREATE SEQUENCE spoilt;
CREATE TABLE dropped (id int PRIMARY KEY, v text);
INSERT INTO dropped SELECT g, g FROM generate_series(1, 999) g;
INSERT INTO dropped VALUES (1000, NULL);
CREATE FUNCTION spoil() RETURNS void LANGUAGE plpgsql AS $$
DECLARE how text := (SELECT max(s.how) FROM public.spoils s WHERE nextval('public.spoilt') < 500);
BEGIN
	IF how = 'forth' THEN
		INSERT INTO public.dropped (id, v) VALUES (1, 'x') ON CONFLICT DO NOTHING;
	ELSIF how = 'back' THEN
		INSERT INTO public.dropped (id, v) VALUES (1, 5000000000) ON CONFLICT DO NOTHING;
	END IF;
END $$;
CREATE FUNCTION spoiled(text) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
	IF $1 IS NULL THEN
		PERFORM public.spoil();
	END IF;
	RETURN coalesce($1, '7')::bigint;
END $$;
CALL rm_add_column('dropped', 'v', 'bigint', 'spoiled(v)', reverse_expr => 'v::int::text');
CALL rm_backfill_batched();
INSERT INTO spoils VALUES ('forth');
});
	gives_up('CALL rm_enforce_not_null()', qr/rm_conversion_errors shows/, 'values that do not convert');
	is(sql(q{SELECT string_agg(DISTINCT value, ',') FROM rm_conversion_errors}), 'x', 'they are shown');
	is(sql($last), 'enforce_not_null|failed|55000', 'the state is true');
	sql('DELETE FROM spoils; CALL rm_enforce_not_null(); CALL rm_swap()');
	is(sql('SELECT sum(v) FROM dropped'), 999 * 500 + 7, 'it goes on');
	sql(q{INSERT INTO dropped (id, v) VALUES (1, 5000000000) ON CONFLICT DO NOTHING; INSERT INTO spoils VALUES ('back'); SELECT setval('spoilt', 1)});
	gives_up('CALL rm_rollback()', qr/do not fit the old type/, 'values that do not fit the old type');
	is(sql($last), 'swap|failed|55000', 'the state is true');
	sql('DELETE FROM spoils; CALL rm_rollback()');
	is(sql('SELECT sum(v::int), count(*) FROM dropped'), 999 * 500 . '|1000', 'it goes back');
}

# ---------------------------------------------------------------------------
# The disk is full
# ---------------------------------------------------------------------------

SKIP:
{
	my $disk = PostgreSQL::Test::Utils::tempdir();

	skip 'no tmpfs can be mounted here', 62
	  if !$ENV{RM_OWN_MOUNTS} || system("mount -t tmpfs -o size=12M,mode=0700 tmpfs '$disk' 2>/dev/null");
	# fills the disk but for so many bytes
	my $ballast = sub {
		my ($free) = @_;
		my $avail = (split ' ', `df -B1 --output=avail '$disk' | tail -1`)[0];
		sql('CREATE TABLE ballast (x text) TABLESPACE small; ALTER TABLE ballast ALTER x SET STORAGE EXTERNAL');
		sql("INSERT INTO ballast SELECT repeat('x', " . int(($avail - $free) * 0.95) . ')');
	};

	sql("CREATE TABLESPACE small LOCATION '$disk'");
	sql(q{
CREATE TABLE full_heap (id int PRIMARY KEY, v text) TABLESPACE small;
INSERT INTO full_heap SELECT g, g || repeat(' ', 60) FROM generate_series(1, 30000) g;
});
	my $shape = shape('full_heap');
	$ballast->(1_000_000);
	sql(q{CALL rm_add_column('full_heap', 'v', 'text', $$v || repeat('x', 60)$$)});
	is((error_of('CALL rm_backfill_batched(1000)'))[0], '53100', 'the disk is full in the backfill');
	is(sql($last), 'backfill|failed|53100', 'the state is true');
	is((error_of('CALL rm_backfill_batched(1000)'))[0], '53100', 'again');
	is(sql('SELECT count(*), count(v) FROM full_heap'), '30000|30000', 'the table can be used');
	sql('DROP TABLE ballast');
	sql('CALL rm_backfill_batched(1000); CALL rm_enforce_not_null()');
	is(sql(q{SELECT count(*) FROM full_heap WHERE v_new = v || repeat('x', 60)}), 30000,
		'with room again, it goes on');
	sql('CALL rm_rollback()');
	is(shape('full_heap'), $shape, 'taken back, nothing is left');
	sql('DROP TABLE full_heap');

	# an index
	sql(q{
CREATE TABLE full_index (id int PRIMARY KEY, v text);
INSERT INTO full_index SELECT g, g FROM generate_series(1, 100000) g;
CREATE INDEX full_v ON full_index (v) TABLESPACE small;
});
	$shape = shape('full_index');
	sql(q{
CALL rm_add_column('full_index', 'v', 'bigint', 'v::bigint');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
});
	$ballast->(1_000_000);
	my ($state, $detail, $hint) = error_of('CALL rm_swap()');
	is($state, '53100', 'the disk is full in the index');
	isnt($hint, '', 'what to do is said');
	is(sql($last), 'build|failed|53100', 'the state is true');
	is(sql($invalid), 0, 'no invalid index is left');
	sql(q{UPDATE full_index SET v = '-1' WHERE id = 1; DROP TABLE ballast; CALL rm_swap()});
	is(sql('SELECT v FROM full_index WHERE id = 1'), -1, 'with room again, it goes on');
	sql('UPDATE full_index SET v = 1 WHERE id = 1; CALL rm_rollback()');
	is(shape('full_index'), $shape, 'taken back, nothing is left');
	sql('DROP TABLE full_index');

	# online_rewrite, in the step where the disk gets full
	my $call = q{CALL rm_alter_type('full_rewrite', 'v', 'bigint', 'v::bigint', 'online_rewrite', cut_over => 'manual')};
	my $files = q{SELECT string_agg(relname, ' ') FROM pg_class c JOIN pg_tablespace t ON t.oid = c.reltablespace
		WHERE spcname = 'small' AND relname !~ 'toast'};
	my $make_table = sub {
		my ($heap, $index) = @_;
		sql(qq{
CREATE TABLE full_rewrite (id int PRIMARY KEY USING INDEX TABLESPACE $index, v text NOT NULL, filler text)
	WITH (fillfactor = 60) TABLESPACE $heap;
INSERT INTO full_rewrite SELECT g, g, repeat(' ', 60) FROM generate_series(1, 20000) g;
});
		return shape('full_rewrite');
	};
	my $rows_are = sub {
		my ($changed, $name) = @_;
		is(sql('SELECT count(*), count(*) FILTER (WHERE v::int = -id) FROM full_rewrite'), "20000|$changed", $name);
		return;
	};

	foreach my $step (qw(copy index cut_over))
	{
		foreach my $back (0, 1)
		{
			my $shape = $make_table->($step eq 'index' ? qw(pg_default small) : qw(small pg_default));
			my $every = $step eq 'cut_over' ? 1 : 200;
			my $change = "UPDATE full_rewrite SET v = -v::int WHERE id % $every = 0";

			if ($step eq 'cut_over')
			{
				sql($call);
				sql($change);
			}
			$ballast->(200_000);
			($state, $detail, $hint) = error_of($step eq 'cut_over' ? 'CALL rm_cut_over()' : $call);
			is($state, '53100', "the disk is full in $step of online_rewrite");
			like($hint, qr/disk space/, 'what to do is said');
			is(sql($last), "$step|failed|53100", 'the state is true');
			sql($change) if $step ne 'cut_over';
			$rows_are->(20000 / $every, 'the table can be used');
			sql('DROP TABLE ballast');
			if ($back)
			{
				sql('CALL rm_rollback()');
				is(shape('full_rewrite'), $shape, 'taken back, nothing is left');
			}
			else
			{
				sql('SELECT rm_resume(max(id)) FROM rm_migrations');
				if ($step ne 'cut_over')
				{
					becomes(q{SELECT next_call ~ '^CALL rm_cut_over' FROM rm_migrations ORDER BY id DESC LIMIT 1}, 't',
						'with room again, it goes on');
					sql('CALL rm_cut_over()');
				}
				becomes($last, 'finish|done|', 'with room again, it comes to its end');
				is(shape('full_rewrite'), $shape =~ s/v text/v bigint/r, 'with what ALTER TABLE makes');
			}
			$rows_are->(20000 / $every, 'no row is lost');
			is(sql($files), $step eq 'index' ? 'full_rewrite_pkey' : 'full_rewrite', 'nothing of it is left on the disk');
			sql('DROP TABLE full_rewrite');
		}
	}

	# what is exchanged is there already
	$make_table->(qw(small small));
	sql($call);
	sql('CREATE TABLE ballast (x text) TABLESPACE small');
	is((error_of(q{INSERT INTO ballast SELECT repeat('x', 1900) FROM generate_series(1, 10000)}))[0], '53100', 'not a page is free');
	sql('CALL rm_cut_over()');
	is(sql($last), 'finish|done|', 'the cut-over of online_rewrite needs none');
	$rows_are->(0, 'every row is there');
	sql('DROP TABLE full_rewrite, ballast');
}

# ---------------------------------------------------------------------------
# A role with settings of its own; somebody else's table
# ---------------------------------------------------------------------------

{
	sql(q{
CREATE TABLE mine (id int PRIMARY KEY, v text UNIQUE, w text);
INSERT INTO mine SELECT g, g, g FROM generate_series(1, 20000) g;
CREATE VIEW mine_view AS SELECT v FROM mine;
}, 'app');
	my $shape = shape('mine');
	sql(q{
ALTER ROLE app SET statement_timeout = '100ms';
ALTER ROLE app SET idle_in_transaction_session_timeout = '20ms';
ALTER ROLE app SET lock_timeout = '1ms';
ALTER ROLE app SET default_transaction_isolation = 'serializable';
ALTER ROLE app SET default_transaction_deferrable = on;
ALTER ROLE app SET synchronous_commit = off;
ALTER ROLE app SET session_replication_role = replica;
ALTER ROLE app SET row_security = off;
ALTER ROLE app SET quote_all_identifiers = on;
ALTER ROLE app SET DateStyle = 'German';
ALTER ROLE app SET search_path = '';
});
	sql(q{CALL public.rm_alter_type('public.mine', 'v', 'bigint', 'v::bigint')}, 'app');
	is(sql('SELECT count(*) FROM mine WHERE v = id'), 20000,
		'a role with timeouts, SERIALIZABLE and an empty search_path does it in the foreground');
	sql('CALL public.rm_rollback()', 'app');
	is(shape('mine'), $shape, 'and takes it back to the letter');

	my $id = sql(q{SET statement_timeout = 0; SELECT public.rm_start('public.mine', 'v', 'bigint', 'v::bigint')}, 'app');
	becomes("SELECT steps_done, running_pid IS NULL FROM rm_migrations WHERE id = $id", '5|t', 'in the background likewise');
	sql("CALL public.rm_rollback($id)", 'app');
	is(shape('mine'), $shape, 'and back');
	sql('ALTER ROLE app RESET ALL');

	# a superuser does it for the owner
	sql(q{CALL rm_alter_type('mine', 'v', 'bigint', 'v::bigint')});
	is(sql(q{SELECT DISTINCT relowner::regrole FROM pg_class WHERE relname LIKE 'mine%' OR relname LIKE 'rm\_%\_%\_%'}),
		'app', 'what a superuser makes belongs to the owner of the table');
	sql('CALL rm_rollback()', 'app');
	is(shape('mine'), $shape, 'and the owner can take it back');
}

$node->stop;
done_testing();
