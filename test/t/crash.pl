# Whatever is killed when: the state is true, the work goes on where it was,
# and no row is lost, doubled or left unconverted.
#
# Each step is broken off again and again, at moments drawn from a seed that is
# printed (RM_SEED sets it): by a kill -9 of the whole server and of its
# postmaster, of the one backend, by pg_terminate_backend(), pg_cancel_backend()
# and by the client's death.  Nothing is decided by how far it came: whatever
# moment is hit, what is said of it must hold.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $seed = $ENV{RM_SEED} // int(time) % 1_000_000;
srand($seed);
note "seed $seed";

# more than one window of the backfill (1024 pages)
my $rows = 200_000;

my $node = start_lab('crash', $rows, q{
restart_after_crash = on
client_connection_check_interval = 20ms
autovacuum = off
checkpoint_timeout = 1h
max_wal_size = 4GB
});

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

# The pid of the backend that runs the migration, '' when none does any more.
sub runner
{
	my ($call) = @_;
	for (1 .. 100 * $PostgreSQL::Test::Utils::timeout_default)
	{
		my $pid = sql('SELECT running_pid FROM rm_migrations WHERE running_pid IS NOT NULL');
		return $pid if $pid ne '';
		$call->{handle}->pump_nb;
		return '' unless $call->{handle}->pumpable;
		usleep(1_000);
	}
	die 'the call neither begins nor ends';
}

# All processes of the server.
sub server_processes
{
	my $postmaster = $node->{_pid};
	my @pids = ($postmaster);
	foreach my $stat (glob '/proc/[0-9]*/stat')
	{
		open my $file, '<', $stat or next;
		my $line = <$file> // '';
		close $file;
		push @pids, $1 if $line =~ /^(\d+) \(.*\) \S (\d+) / && $2 == $postmaster;
	}
	return @pids;
}

sub wait_for_end
{
	my (@pids) = @_;
	for (1 .. 100 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return unless kill 0, @pids;
		usleep(10_000);
	}
	die 'the processes of the server do not end';
}

# The whole server at once, as a power failure would.
sub kill_server
{
	my @pids = server_processes();
	# nobody may notice that another one is gone
	kill 'STOP', @pids;
	$node->kill9;
	kill 'KILL', @pids;
	wait_for_end(@pids);
	restart();
	return;
}

# The postmaster alone: its children find out by themselves.
sub kill_postmaster
{
	my @pids = server_processes();
	$node->kill9;
	wait_for_end(@pids);
	restart();
	return;
}

sub restart
{
	$node->start;
	return;
}

# SIGKILL of the backend: the postmaster restarts all the others, unless it was
# gone already.
sub kill_backend
{
	my ($pid) = @_;
	kill 'KILL', $pid;
	comes_back_after($pid) or die 'the server does not come back';
	return;
}

my %kill = (
	'kill -9 of the server' => sub { kill_server() },
	'kill -9 of the postmaster' => sub { kill_postmaster() },
	'immediate shutdown' => sub { $node->stop('immediate'); restart() },
	'kill -9 of the backend' => sub { kill_backend($_[0]) },
	'pg_terminate_backend' => sub { sql("SELECT pg_terminate_backend($_[0])") },
	'pg_cancel_backend' => sub { sql("SELECT pg_cancel_backend($_[0])") },
	'death of the client' => sub { $_[1]->{handle}->signal('KILL') },);

# Runs the statements and breaks them off after up to $longest seconds, if they
# have not come to their end before.  Returns the ended call.
sub break_off
{
	my ($how, $longest, @statements) = @_;
	my $call = start_call('call', @statements);
	my $pid = runner($call);

	if ($pid ne '')
	{
		usleep(int(rand($longest) * 1_000_000));
		$kill{$how}->($pid, $call);
	}
	finish_call($call);
	# a connection that is refused while the server recovers is asked again
	wait_for("NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = 0$pid)", "process $pid does not end");
	return $call;
}

# 0 unless something is wrong with a row, seen from outside the extension
sub wrong_rows
{
	return sql(q{
SELECT count(*) FILTER (WHERE created_at IS DISTINCT FROM
	to_char(timestamp '2024-01-01 09:59:59' + substr(name, 13)::int * interval '1 s', 'YYYY-MM-DD HH24:MI:SS'))
	+ count(*) - count(DISTINCT name) + (SELECT rows_wrong FROM rm_lab_check())
FROM large_record});
}

# All there is of the table in the catalogs.
sub catalogs
{
	return sql(q{
SELECT 'column ' || attname || ' ' || format_type(atttypid, atttypmod) || ' ' || attnotnull
	FROM pg_attribute WHERE attrelid = 'large_record'::regclass AND attnum > 0 AND NOT attisdropped
UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgrelid = 'large_record'::regclass
UNION ALL SELECT 'constraint ' || conname || ' ' || pg_get_constraintdef(oid)
	FROM pg_constraint WHERE conrelid = 'large_record'::regclass
UNION ALL SELECT 'depend ' || pg_describe_object(classid, objid, objsubid) || ' on '
	|| pg_describe_object(refclassid, refobjid, refobjsubid)
	FROM pg_depend WHERE 'large_record'::regclass IN (objid, refobjid)
ORDER BY 1});
}

sub state_of_migration
{
	return sql(q{
SELECT last_step_state, coalesce(sqlstate, ''), coalesce(next_call, '') FROM rm_migrations
WHERE state = 'open'});
}

# ---------------------------------------------------------------------------
# Setting
# ---------------------------------------------------------------------------

# what is hinted in the table need not be written again by the first reader
sql('VACUUM large_record');
my $before = catalogs();

# ---------------------------------------------------------------------------
# The backfill: state and rows are lost together or not at all
# ---------------------------------------------------------------------------

my $progress = q{
SELECT (SELECT rows_done FROM risky_migrations.migration WHERE state = 'open'),
	(SELECT count(created_at_new) FROM large_record),
	(SELECT next_block FROM risky_migrations.migration WHERE state = 'open'),
	(SELECT steps_done FROM risky_migrations.migration WHERE state = 'open')};

# Breaks the backfill off until it has come to its end.
sub backfill
{
	my ($batch, $row_lock_time, @ways) = @_;
	my ($last_rows, $last_block, $broken, $resumed) = (0, 0, 0, 0);

	sql(q{CALL rm_migrate('0003')});
	for my $round (0 .. $#ways)
	{
		my $how = $ways[$round];
		my $name = "batches of $batch, $how";
		my $call = break_off($how, 0.5,
			"SET risky_migrations.max_row_lock_time = $row_lock_time",
			"CALL rm_backfill_batched($batch)");
		my ($rows_done, $filled, $block, $steps) = split /\|/, sql($progress);

		is($rows_done, $filled, "$name: rows_done is what was done ($filled)");
		cmp_ok($rows_done, '>=', $last_rows, "$name: it went on where it was");
		cmp_ok($block, '>=', $last_block, "$name: also as to pages ($block)");
		is(wrong_rows(), 0, "$name: no row is wrong");
		$resumed++ if $last_rows > 0 && $rows_done > $last_rows;
		($last_rows, $last_block) = ($rows_done, $block);

		my $state = state_of_migration();
		if ($steps == 2)
		{
			like($state, qr/^done\|\|CALL rm_enforce_not_null\(\d+\)$/, "$name: done");
			# once more from the beginning
			sql(q{CALL rm_migrate('0003')});
			($last_rows, $last_block) = (0, 0);
		}
		elsif ($how eq 'pg_cancel_backend')
		{
			$broken++;
			like($state, qr/^failed\|57014\|CALL rm_backfill_batched\(100000, \d+\)$/,
				"$name: it says that it was cancelled, and what to call");
			like($call->{err}, qr/57014/, "$name: so does the call");
		}
		else
		{
			$broken++;
			# by pg_terminate_backend() it may have had the time to say more
			like($state, qr/^(interrupted\||failed\|57P01)\|CALL rm_backfill_batched\(100000, \d+\)$/,
				"$name: it says that it was interrupted, and what to call");
		}
	}
	note "$broken of " . scalar(@ways) . " broken off, $resumed resumed";
	cmp_ok($broken, '>', 0, "batches of $batch: some were broken off");

	my $first = sql(q{SELECT coalesce(max(id), 0) FROM risky_migrations.step_log});
	my $done_before = sql($progress);
	sql("CALL rm_backfill_batched($batch)");
	my ($rows_done, $filled) = split /\|/, sql($progress);
	is("$rows_done|$filled", "$rows|$rows", "batches of $batch: done in the end");
	is( sql("SELECT rows_changed FROM risky_migrations.step_log WHERE id > $first AND step = 'backfill'"),
		$rows - (split /\|/, $done_before)[0],
		"batches of $batch: the last call did just what was left");
	is( sql(q{SELECT state FROM risky_migrations.step_log WHERE state = 'running'}),
		'', "batches of $batch: no step is left as running");
	is(wrong_rows(), 0, "batches of $batch: no row is wrong in the end");
	return;
}

# many small transactions, then few large ones
backfill(
	500, "'1 ms'",
	'kill -9 of the server',
	'pg_cancel_backend',
	'kill -9 of the postmaster',
	'kill -9 of the backend',
	'pg_terminate_backend',
	'death of the client',
	'immediate shutdown',
	'kill -9 of the server');
sql(q{CALL rm_migrate('0003')});
backfill(
	100_000, "'60 s'",
	'kill -9 of the server',
	'pg_cancel_backend',
	'kill -9 of the server',
	'pg_terminate_backend');

# ---------------------------------------------------------------------------
# 0005: done or not, and nothing in between that is not said
# ---------------------------------------------------------------------------

foreach my $how (
	'kill -9 of the server',
	'pg_cancel_backend',
	'kill -9 of the backend',
	'death of the client',
	'pg_terminate_backend')
{
	sql(q{CALL rm_migrate('0004')});
	break_off($how, 0.12, 'CALL rm_enforce_not_null()');
	my $state = state_of_migration();
	if ($state =~ /^done/)
	{
		note "0005, $how: it was done before";
	}
	else
	{
		like($state, qr/^(interrupted\||failed\|57P01|failed\|57014)\|CALL rm_enforce_not_null\(\d+\)$/,
			"0005, $how: it says that it was interrupted, and what to call");
	}
	is(wrong_rows(), 0, "0005, $how: no row is wrong");
	sql(q{CALL rm_migrate('0005')});
	is( sql(q{SELECT attnotnull FROM pg_attribute
		WHERE attrelid = 'large_record'::regclass AND attname = 'created_at_new'}),
		't', "0005, $how: called again, it is done");
	unlike(catalogs(), qr/constraint rm_/, "0005, $how: its CHECK is gone");
	is(wrong_rows(), 0, "0005, $how: no row is wrong in the end");
}

# broken off between its phases, and then not wanted any more: 0004 has no CHECK
my $event_trigger = q{
CREATE FUNCTION stop_after_check() RETURNS event_trigger
LANGUAGE plpgsql SET search_path = public AS $$
BEGIN
	IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'large_record'::regclass
			AND contype = 'c' AND convalidated) THEN
		RAISE EXCEPTION 'stopped';
	END IF;
END $$;
CREATE EVENT TRIGGER stop_after_check ON ddl_command_end
	WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION stop_after_check();
};
sql(q{CALL rm_migrate('0004')});
my $at_0004 = catalogs();
sql($event_trigger);
isnt($node->psql('postgres', 'CALL rm_enforce_not_null()'), 0, '0005 stops at its VALIDATE');
sql('DROP EVENT TRIGGER stop_after_check');
like(catalogs(), qr/constraint rm_/, 'its CHECK is there');
sql(q{CALL rm_migrate('0004')});
is(catalogs(), $at_0004, '0004 asked for after that is 0004 as it was');

# ---------------------------------------------------------------------------
# The way back: nothing is left lying about
# ---------------------------------------------------------------------------

foreach my $from ('0003', '0004', '0005')
{
	foreach my $how (
		'kill -9 of the server',
		'pg_cancel_backend',
		'kill -9 of the backend',
		'pg_terminate_backend')
	{
		next if $from eq '0004' && $how ne 'kill -9 of the server';
		sql(qq{CALL rm_migrate('$from')});
		my $call = break_off($how, 0.02, 'CALL rm_rollback()');
		is(wrong_rows(), 0, "back from $from, $how: no row is wrong");
		my $open = sql(q{SELECT count(*) FROM rm_migrations WHERE state = 'open'});
		sql('CALL rm_rollback()') if $open;
		is(catalogs(), $before, "back from $from, $how: nothing is left lying about");
		is(wrong_rows(), 0, "back from $from, $how: no row is wrong in the end");
		is( sql(q{
SELECT (SELECT count(*) FROM risky_migrations.skipped_row),
	(SELECT count(*) FROM risky_migrations.conversion_error),
	(SELECT count(*) FROM risky_migrations.migration WHERE state = 'open'),
	(SELECT count(*) FROM risky_migrations.step_log WHERE state = 'running'),
	(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')}),
			'0|0|0|0|0', "back from $from, $how: nor in the state");
	}
}

# a backfill that was broken off, and then taken back
foreach my $how ('kill -9 of the server', 'pg_cancel_backend')
{
	sql(q{CALL rm_migrate('0003')});
	break_off($how, 0.2, "SET risky_migrations.max_row_lock_time = '1 ms'",
		'CALL rm_backfill_batched(500)');
	sql('CALL rm_rollback()');
	is(catalogs(), $before, "backfill, $how, rollback: nothing is left lying about");
	is(wrong_rows(), 0, "backfill, $how, rollback: no row is wrong");
}
is(sql('SELECT count(*) FROM large_record'), $rows, 'no row is lost or doubled');

$node->stop;
done_testing();
